//! Parts of the workspace that kernels touch, by the arguments that kernels/device declares and not by the plans.

use super::super::launch::{Arg, Launch};
use super::super::tuning::CHANNELS;
use crate::contract::check::CheckedCall;
use crate::contract::view::DType;

/// Memory of the workspace: its address and its bytes.
pub type Span = (u64, usize);

/// The parts that the launch touches of the workspace of a call, which begins at `start`.
pub fn spans(call: &CheckedCall, launch: &Launch, start: u64) -> Vec<Span> {
    let of_pointers =
        (floats(call, launch).into_iter()).map(|(at, floats)| match launch.args[at] {
            Arg::Pointer(address) => (address, floats * size_of::<f32>()),
            ref other => panic!("{}: {other:?} at {at}", launch.kernel.symbol()),
        });
    let of_tensors = launch.args.iter().filter_map(|arg| match arg {
        Arg::TensorMap(tensor) | Arg::BlockMaps(tensor) => {
            let values = tensor.tokens * tensor.num_streams * tensor.hidden;
            Some((tensor.address, values * tensor.dtype.num_bytes()))
        }
        _ => None,
    });
    let spans = of_pointers.chain(of_tensors);
    spans.filter(|(address, _)| *address >= start).collect()
}

/// The arguments that may lie in the workspace, each with its number of floats.
fn floats(call: &CheckedCall, launch: &Launch) -> Vec<(usize, usize)> {
    let int = |at: usize| match launch.args[at] {
        Arg::I32(number) => number as usize,
        Arg::I64(number) => number as usize,
        ref other => panic!("{}: {other:?} at {at}", launch.kernel.symbol()),
    };
    let [blocks, rows, _] = launch.grid.map(|blocks| blocks as usize);
    let (tokens, n, c, columns) = (call.tokens, call.n, call.c, call.columns);
    let streams = |values: usize| (values * call.dtype.num_bytes()).div_ceil(size_of::<f32>());
    let partial = |slices: usize| tokens * slices * (columns.div_ceil(8) * 8 + 2);
    let parts = if call.dtype == DType::F32 { 3 } else { 2 };
    let row_parts = [parts, 1][usize::from(call.dtype == DType::Bf16)];
    let tiles = tokens.div_ceil(16);
    let dm = [
        tiles * columns.div_ceil(16) * row_parts * 32 * 4,
        tiles * columns.div_ceil(8) * parts * 32 * 2,
    ];
    let sums = columns + 3;
    let iters = call.config.sinkhorn_iters;
    let d_phi = n * c * columns;
    // Where a unit of 16 channels is another's in part.
    let padded = c.next_multiple_of(16);
    let padded_d_phi = n * padded * columns;
    let padded_columns = || match columns {
        ..=80 => 80,
        columns => columns.next_multiple_of(144),
    };
    // Where dots are there no warp is for the streams of a token.
    let matrix_warps = |has_dots| launch.block as usize / 32 - if has_dots { 0 } else { 8 };
    let function = launch.kernel.function;
    match function.strip_suffix("_unaligned").unwrap_or(function) {
        "project" => vec![(2, partial(blocks))],
        "phi_fragments" => {
            let rows = (n * c).div_ceil(32) * 32;
            vec![(1, int(5) * rows * int(4) * 8 * parts / 2)]
        }
        "project_tiled" => {
            let rows = (n * c).div_ceil(32) * 32;
            vec![
                (0, streams(tokens * n * c)),
                (1, int(8) * rows * int(7) * 8 * parts / 2),
                (2, partial((n * c).div_ceil(int(6)))),
            ]
        }
        // Two bytes for each part of a number, of which there are two.
        "phi_lines" => vec![(1, n * c * padded_columns())],
        "project_lines" => vec![
            (1, n * c * padded_columns()),
            (2, partial((n * c).div_ceil(int(6)))),
        ],
        "r_dm_lines" => vec![
            (0, dm[1]),
            (1, tokens.next_multiple_of(64) * padded_columns()),
        ],
        "d_phi_lines" => vec![
            (1, tokens.next_multiple_of(64) * padded_columns()),
            (2, int(6) * d_phi),
        ],
        "pre_fwd" => {
            let tokens = int(11);
            let coefficients = [(6, tokens * n), (7, tokens * n), (8, tokens * n * n)];
            let streams = [(0, streams(tokens * n * c)), (1, partial(int(2)))];
            streams
                .into_iter()
                .chain(coefficients)
                .chain([(10, tokens)])
                .collect()
        }
        "pre_bwd" => vec![
            (0, streams(tokens * n * c)),
            (5, streams(tokens * c)),
            (6, int(15) * n),
            (7, int(15) * n),
            (8, int(15) * n * n),
            (9, dm[0]),
            (10, dm[1]),
            (11, int(15) * n),
            (12, 2 * int(15)),
            (13, blocks * (call.layout.num() + 3)),
            (14, blocks * 2 * iters * 32 * matrix_warps(int(21) > 0)),
            (20, tokens * int(21) * n),
        ],
        "sum_gates" => vec![(0, int(3) * (int(4) + 3))],
        "phi_back_lines" => vec![(1, n * c * 160), (2, n * c / 8)],
        "project_back_lines" => vec![
            (0, streams(tokens * n * c)),
            (1, n * c * 160),
            (2, n * c / 8),
            (3, dm[0]),
            (5, tokens * n),
            (6, 2 * tokens),
            (7, streams(tokens * c)),
        ],
        "project_back" | "project_back_mixing" | "project_back_streams" | "project_back_stages" => {
            vec![
                (0, streams(tokens * n * c)),
                (2, dm[0]),
                (4, tokens * n),
                (5, 2 * tokens),
                (6, streams(tokens * c)),
            ]
        }
        "d_phi" => vec![
            (0, streams(tokens * n * c)),
            (1, dm[0]),
            (2, dm[1]),
            (4, rows * d_phi),
        ],
        "sum_d_phi" => vec![(0, int(2) * int(3))],
        "post_pre_static_fwd" => vec![(4, n), (5, n), (6, n * n)],
        "pre_static_bwd" => vec![
            (0, streams(tokens * n * c)),
            (2, streams(tokens * c)),
            (6, tokens * n),
        ],
        "post_pre_static_bwd" => vec![(12, tokens * n)],
        "sum_static" => vec![
            (0, tokens * n),
            (1, tokens * n),
            (4, blocks * n),
            (5, blocks * n),
            (6, blocks * n * n),
        ],
        "norm_fwd" => vec![(0, streams(tokens * n * c))],
        "norm_bwd" | "norm_bwd_once" => vec![
            (0, streams(tokens * n * c)),
            (8, streams(tokens * c)),
            (9, blocks * c),
            (10, tokens * n),
        ],
        "sum_norm_scale" => vec![(0, int(2) * int(4))],
        "post_pre_norm_bwd" => vec![(11, streams(tokens * c)), (12, blocks * c)],
        "logits_bwd" => vec![(5, tokens * columns)],
        "pre_bwd_one_pass" | "pre_norm_bwd_one_pass" => {
            let clusters = blocks / launch.cluster as usize;
            let is_summed = launch.kernel.more("sums_phi") > 0;
            let product = if is_summed {
                clusters * padded_d_phi
            } else {
                dm[1]
            };
            let common = [
                (10, tokens * n),
                (11, tokens * columns),
                (12, product),
                (13, launch.kernel.more("owner_warps") * blocks * sums),
            ];
            let mut sizes = CHANNELS.iter();
            let size = sizes.find(|size| size.name == launch.kernel.size).unwrap();
            let all_channels = launch.cluster as usize * size.number as usize;
            let norm = function
                .contains("norm")
                .then_some((20, clusters * all_channels));
            common.into_iter().chain(norm).collect()
        }
        "post_pre_bwd_one_pass" => {
            let clusters = blocks / launch.cluster as usize;
            let is_summed = launch.kernel.more("sums_phi") > 0;
            let product = if is_summed {
                clusters * padded_d_phi
            } else {
                tokens * columns
            };
            vec![
                (18, tokens * columns),
                (21, product),
                (22, 2 * blocks * sums),
            ]
        }
        "pre_bwd_one_stream" => vec![
            (0, streams(tokens * c)),
            (1, streams(tokens * c)),
            (9, tokens),
            (13, blocks * d_phi),
            (14, blocks * sums),
        ],
        "post_pre_bwd_one_stream" => vec![(19, blocks * d_phi), (20, blocks * sums)],
        "sum_one_stream" => vec![(0, int(5) * int(6)), (1, int(5) * sums)],
        "phi_bwd" => vec![(4, tokens * columns), (5, rows * padded_d_phi)],
        "sum_gradients" => vec![
            (0, 4 * int(5) * int(7) / int(8) * int(9)),
            (1, int(6) * sums),
        ],
        "post_given_bwd" => {
            let dots = tokens.next_multiple_of(8) * blocks * launch.kernel.more("dots");
            let repliers = launch.kernel.more("repliers");
            vec![
                (19, tokens * columns),
                (20, dots),
                (21, rows * padded_d_phi),
                (22, repliers * rows * sums),
            ]
        }
        "sum_given" => vec![
            (0, int(12) * 4 * int(13) / int(14) * int(15)),
            (1, int(12) * sums),
            (2, tokens * int(18) * launch.kernel.more("dots")),
        ],
        "sinkhorn_bwd" => vec![(3, blocks * 2 * iters * launch.block as usize)],
        "post_fwd" => vec![(4, streams(tokens * n * c))],
        "collapse_bwd" => vec![(0, streams(tokens * n * c))],
        "post_given_fwd" => {
            let slices = blocks / launch.cluster as usize;
            vec![(8, tokens * slices * columns), (9, tokens * slices)]
        }
        "given_coefficients" => vec![(0, tokens * int(2) * columns), (1, tokens * int(2))],
        "post_dots_fwd" => vec![
            (5, streams(tokens * n * c)),
            (6, tokens * c.div_ceil(128) * n),
        ],
        _ => vec![],
    }
}
