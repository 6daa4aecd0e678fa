//! The three products with phi, on tiles that stay in registers: vec(X) phi (equation 14),
//! dm phiᵀ, and vec(X)ᵀ dm.
//!
//! Vectors run along the channels of one stream. phi is repacked once a call: for each stream, for
//! each three of its columns, blocks of as many channels as a vector has lanes. Channels and columns
//! that do not exist are zero there.

use crate::cpu::parallel::{Pool, Serial, for_each};
use crate::cpu::scratch::{Exhausted, collected, filled};
use crate::cpu::simd::{Isa, Kernel, MAX_LANES, Vector};
use crate::cpu::stream::{Acc, Rows, Stream};

/// Columns of phi in one tile.
const COLUMNS: usize = 3;

/// Blocks of channels that are worked on at a time, so that they and their part of phi stay in the
/// cache: a multiple of every tile's size.
pub const STAGE: usize = 24;

/// One token's channels of one stage.
pub type Staged<V> = [V; STAGE];

/// Sizes of a repacked phi.
#[derive(Clone, Copy)]
pub struct Shape {
    /// Streams.
    pub n: usize,
    /// Channels of one stream.
    pub c: usize,
    /// Columns.
    pub columns: usize,
    /// Blocks of channels a stream.
    pub blocks: usize,
    /// Tiles of columns.
    tiles: usize,
}

impl Shape {
    /// The sizes for vectors of `lanes` lanes.
    pub fn new(n: usize, c: usize, columns: usize, lanes: usize) -> Self {
        Self {
            n,
            c,
            columns,
            blocks: c.div_ceil(lanes),
            tiles: columns.div_ceil(COLUMNS),
        }
    }
    /// Columns, with those that fill the last tile.
    pub fn padded_columns(&self) -> usize {
        self.tiles * COLUMNS
    }
    /// How many of `count` blocks from `first` on have all their channels: all, or all but the last.
    #[inline(always)]
    pub fn whole_blocks(&self, first: usize, count: usize, lanes: usize) -> usize {
        count.min(self.c / lanes - first)
    }
    /// The threads that repack: waking another thread takes longer than repacking a small phi.
    fn pool<'a>(&self, pool: &'a dyn Pool) -> &'a dyn Pool {
        const LEAST_VECTORS: usize = 256;
        if self.n * self.stream_len() < LEAST_VECTORS {
            &Serial
        } else {
            pool
        }
    }
    /// Vectors of one stream.
    fn stream_len(&self) -> usize {
        self.tiles * self.blocks
    }
}

/// phi `[n·C, columns]` or its gradient, repacked.
pub struct Packed<V> {
    shape: Shape,
    vectors: Vec<[V; COLUMNS]>,
}

impl<V: Vector> Packed<V> {
    /// Makes a phi that is zero.
    pub fn zeros(shape: Shape) -> Result<Self, Exhausted> {
        Ok(Self {
            shape,
            vectors: filled([V::zero(); COLUMNS], shape.n * shape.stream_len())?,
        })
    }

    /// Repacks `phi`.
    pub fn pack<I: Isa>(phi: &[V::Real], shape: Shape, pool: &dyn Pool) -> Result<Self, Exhausted> {
        let mut packed = Self::zeros(shape)?;
        let pool = shape.pool(pool);
        if shape.stream_len() > 0 {
            let from = phi.chunks_exact(shape.c * shape.columns);
            let to = packed.vectors.chunks_exact_mut(shape.stream_len());
            let streams = from.zip(to).map(|(from, to)| Pack { shape, from, to });
            let streams = collected(shape.n, streams)?;
            each_stream::<I, _>("phi", pool, streams)?;
        }
        Ok(packed)
    }

    /// The sum of `parts`, in their order, in the layout of phi.
    pub fn unpack_sum<I: Isa>(
        parts: &[Self],
        shape: Shape,
        to: &mut [V::Real],
        pool: &dyn Pool,
    ) -> Result<(), Exhausted> {
        let pool = shape.pool(pool);
        if shape.stream_len() > 0 {
            let to = to.chunks_exact_mut(shape.c * shape.columns).enumerate();
            let streams = to.map(|(stream, to)| UnpackSum {
                shape,
                stream,
                parts,
                to,
            });
            let streams = collected(shape.n, streams)?;
            each_stream::<I, _>("d_phi", pool, streams)?;
        }
        Ok(())
    }

    /// Columns, with those that fill the last tile.
    #[inline(always)]
    pub fn padded_columns(&self) -> usize {
        self.shape.padded_columns()
    }

    /// `count` blocks of one tile of columns.
    #[inline(always)]
    fn panel(&self, stream: usize, tile: usize, first: usize, count: usize) -> &[[V; COLUMNS]] {
        let at = stream * self.shape.stream_len() + tile * self.shape.blocks + first;
        &self.vectors[at..at + count]
    }

    #[inline(always)]
    fn panel_mut(
        &mut self,
        stream: usize,
        tile: usize,
        first: usize,
        count: usize,
    ) -> &mut [[V; COLUMNS]] {
        let at = stream * self.shape.stream_len() + tile * self.shape.blocks + first;
        &mut self.vectors[at..at + count]
    }
}

/// Runs a kernel for each stream.
fn each_stream<I: Isa, K: Kernel<I> + Send>(
    pass: &'static str,
    pool: &dyn Pool,
    streams: Vec<K>,
) -> Result<(), Exhausted> {
    for_each(
        pass,
        pool,
        streams,
        || Ok(()),
        |(), _, stream| {
            I::enter(stream);
            Ok(())
        },
    )
}

/// One stream of [`Packed::pack`].
struct Pack<'a, V: Vector> {
    shape: Shape,
    from: &'a [V::Real],
    to: &'a mut [[V; COLUMNS]],
}

impl<V: Vector, I: Isa> Kernel<I> for Pack<'_, V> {
    #[inline(always)]
    fn run(self) {
        let Shape {
            c,
            columns,
            blocks,
            tiles,
            ..
        } = self.shape;
        for block in 0..blocks {
            let first = block * V::LANES;
            let count = V::LANES.min(c - first);
            for column in 0..columns {
                let mut lanes = [V::Real::default(); MAX_LANES];
                for (l, lane) in lanes.iter_mut().enumerate().take(count) {
                    *lane = self.from[(first + l) * columns + column];
                }
                let (tile, k) = (column / COLUMNS, column % COLUMNS);
                debug_assert!(tile < tiles);
                self.to[tile * blocks + block][k] = V::load(&lanes);
            }
        }
    }
}

/// One stream of [`Packed::unpack_sum`].
struct UnpackSum<'a, V: Vector> {
    shape: Shape,
    stream: usize,
    parts: &'a [Packed<V>],
    to: &'a mut [V::Real],
}

impl<V: Vector, I: Isa> Kernel<I> for UnpackSum<'_, V> {
    #[inline(always)]
    fn run(self) {
        let Shape {
            c, columns, blocks, ..
        } = self.shape;
        let first_vector = self.stream * self.shape.stream_len();
        for block in 0..blocks {
            let first = block * V::LANES;
            let count = V::LANES.min(c - first);
            for column in 0..columns {
                let at = first_vector + (column / COLUMNS) * blocks + block;
                let mut total = V::zero();
                for part in self.parts {
                    total = total + part.vectors[at][column % COLUMNS];
                }
                let mut lanes = [V::Real::default(); MAX_LANES];
                total.store(&mut lanes);
                for (l, lane) in lanes.iter().enumerate().take(count) {
                    self.to[(first + l) * columns + column] = *lane;
                }
            }
        }
    }
}

/// The stages of one stream: (first block, number of blocks).
#[inline(always)]
pub fn stages(shape: Shape) -> impl Iterator<Item = (usize, usize)> {
    (0..shape.blocks)
        .step_by(STAGE)
        .map(move |first| (first, STAGE.min(shape.blocks - first)))
}

/// Reads one stage of `tokens` tokens of one stream and converts it.
#[inline(always)]
pub fn stage<S: Stream, I: Isa>(
    x: &Rows<S>,
    tokens: usize,
    stream: usize,
    shape: Shape,
    (first, count): (usize, usize),
    staged: &mut [Staged<Acc<S, I>>],
) {
    let lanes = Acc::<S, I>::LANES;
    let whole = shape.whole_blocks(first, count, lanes);
    for (token, staged) in staged[..tokens].iter_mut().enumerate() {
        let channels = &x.row(token)[stream * shape.c..][..shape.c][first * lanes..];
        for (block, staged) in staged[..whole].iter_mut().enumerate() {
            *staged = S::load::<I, true>(&channels[block * lanes..]);
        }
        if whole < count {
            staged[whole] = S::load::<I, false>(&channels[whole * lanes..]);
        }
    }
}

/// totals[token][column] += <vec(X), phi> over one stage [14], lane by lane.
#[inline(always)]
pub fn project<V: Vector>(
    staged: &[Staged<V>],
    phi: &Packed<V>,
    stream: usize,
    (first, count): (usize, usize),
    totals: &mut [V],
) {
    let columns = phi.shape.padded_columns();
    let mut token = 0;
    while token < staged.len() {
        let step = if staged.len() - token >= V::TILE {
            V::TILE
        } else {
            1
        };
        for tile in 0..phi.shape.tiles {
            let panel = phi.panel(stream, tile, first, count);
            let totals = &mut totals[token * columns + tile * COLUMNS..];
            match step {
                8 => project_tile::<V, 8>(&staged[token..], panel, columns, totals),
                4 => project_tile::<V, 4>(&staged[token..], panel, columns, totals),
                _ => project_tile::<V, 1>(&staged[token..], panel, columns, totals),
            }
        }
        token += step;
    }
}

#[inline(always)]
fn project_tile<V: Vector, const T: usize>(
    staged: &[Staged<V>],
    panel: &[[V; COLUMNS]],
    columns: usize,
    totals: &mut [V],
) {
    let staged = &staged[..T];
    let mut sums = [[V::zero(); COLUMNS]; T];
    for (block, phi) in panel.iter().enumerate().take(STAGE) {
        for t in 0..T {
            for k in 0..COLUMNS {
                sums[t][k] = staged[t][block].mul_add(phi[k], sums[t][k]);
            }
        }
    }
    for t in 0..T {
        for k in 0..COLUMNS {
            let total = &mut totals[t * columns + k];
            *total = *total + sums[t][k];
        }
    }
}

/// d_phi += vec(X)ᵀ (r · dm) over the tokens of one stage; `r_dm` has `padded_columns` a token.
#[inline(always)]
pub fn accumulate_d_phi<V: Vector>(
    staged: &[Staged<V>],
    r_dm: &[V::Real],
    stream: usize,
    (first, count): (usize, usize),
    d_phi: &mut Packed<V>,
) {
    let columns = d_phi.shape.padded_columns();
    for tile in 0..d_phi.shape.tiles {
        let panel = d_phi.panel_mut(stream, tile, first, count);
        let r_dm = &r_dm[tile * COLUMNS..];
        let mut block = 0;
        while block < count {
            let step = if count - block >= V::TILE { V::TILE } else { 1 };
            match step {
                8 => d_phi_tile::<V, 8>(staged, r_dm, columns, block, panel),
                4 => d_phi_tile::<V, 4>(staged, r_dm, columns, block, panel),
                _ => d_phi_tile::<V, 1>(staged, r_dm, columns, block, panel),
            }
            block += step;
        }
    }
}

#[inline(always)]
fn d_phi_tile<V: Vector, const B: usize>(
    staged: &[Staged<V>],
    r_dm: &[V::Real],
    columns: usize,
    block: usize,
    panel: &mut [[V; COLUMNS]],
) {
    let panel = &mut panel[block..block + B];
    let mut sums = [[V::zero(); COLUMNS]; B];
    sums.copy_from_slice(panel);
    for (token, staged) in staged.iter().enumerate() {
        let staged = &staged[block..block + B];
        let r_dm = &r_dm[token * columns..][..COLUMNS];
        let r_dm = [V::splat(r_dm[0]), V::splat(r_dm[1]), V::splat(r_dm[2])];
        for b in 0..B {
            for k in 0..COLUMNS {
                sums[b][k] = staged[b].mul_add(r_dm[k], sums[b][k]);
            }
        }
    }
    panel.copy_from_slice(&sums);
}

/// The (r · dm) phiᵀ of `T` tokens and `B` blocks that begin at `block`.
#[inline(always)]
pub fn project_back<V: Vector, const T: usize, const B: usize>(
    r_dm: &[V::Real],
    phi: &Packed<V>,
    stream: usize,
    block: usize,
) -> [[V; B]; T] {
    let columns = phi.shape.padded_columns();
    let mut sums = [[V::zero(); B]; T];
    for tile in 0..phi.shape.tiles {
        let panel = phi.panel(stream, tile, block, B);
        for k in 0..COLUMNS {
            for t in 0..T {
                let r_dm = V::splat(r_dm[t * columns + tile * COLUMNS + k]);
                for b in 0..B {
                    sums[t][b] = panel[b][k].mul_add(r_dm, sums[t][b]);
                }
            }
        }
    }
    sums
}
