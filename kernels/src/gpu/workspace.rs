//! The parts of a workspace.

use super::launch::Workspace;
use crate::contract::check::CheckedCall;

/// Tokens that the kernels of a projection take at once (`kTile` of matrix.cuh).
pub const TILE: usize = 16;

/// Every part starts at a multiple of this many floats.
const ALIGNMENT: usize = 32;

/// An array in the workspace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Part {
    /// Floats for each token, where tokens are counted in whole tiles.
    pub per_token: usize,
    /// Floats besides.
    pub fixed: usize,
}

impl Part {
    /// Of this many floats a token.
    pub fn per_token(per_token: usize) -> Self {
        Self {
            per_token,
            fixed: 0,
        }
    }

    fn len(&self, tokens: usize) -> usize {
        let len = self.per_token * tokens.next_multiple_of(TILE) + self.fixed;
        len.next_multiple_of(ALIGNMENT)
    }
}

/// Room for all `parts`, whatever the number of tokens.
pub fn room(parts: &[Part]) -> Workspace {
    parts.iter().fold(Workspace::default(), |sum, part| {
        let rounding = part.per_token * (TILE - 1) + ALIGNMENT - 1;
        Workspace {
            per_token: sum.per_token + part.per_token,
            fixed: sum.fixed + part.fixed + rounding,
        }
    })
}

/// Hands out the workspace of a call, part after part.
pub struct Memory {
    next: u64,
    /// Where the workspace ends.
    end: u64,
    tokens: usize,
}

impl Memory {
    /// The workspace of `call`.
    pub fn of(call: &CheckedCall) -> Self {
        let (next, len) = call.workspace().unwrap_or((0, 0));
        Self {
            next,
            end: next.saturating_add((len as u64).saturating_mul(size_of::<f32>() as u64)),
            tokens: call.tokens,
        }
    }

    /// Address of the next part.
    pub fn take(&mut self, part: Part) -> u64 {
        let address = self.next;
        self.next += (part.len(self.tokens) * size_of::<f32>()) as u64;
        assert!(self.next <= self.end, "no room for {part:?}");
        address
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_fit_into_the_room_for_them() {
        let parts = [
            Part::per_token(7),
            Part {
                per_token: 0,
                fixed: 5,
            },
            Part {
                per_token: 3,
                fixed: 100,
            },
        ];
        for tokens in [0, 1, 15, 16, 17, 1000] {
            let end = 4 * room(&parts).len(tokens) as u64;
            let mut memory = Memory {
                next: 0,
                end,
                tokens,
            };
            for part in parts {
                let start = memory.take(part);
                assert_eq!(start % 128, 0);
            }
        }
    }
}
