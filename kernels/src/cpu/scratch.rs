//! Memory that a call on the CPU takes for itself: whatever grows with the sizes of a call is asked for
//! here, so that a call without it ends in an error.
//!
//! Everything else (a task, an error's text) is small and of a size that no call changes.

/// Memory that the system did not give.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exhausted {
    /// Size of the one allocation that failed.
    pub bytes: usize,
}

/// An empty vector with room for `len` elements.
pub fn with_capacity<T>(len: usize) -> Result<Vec<T>, Exhausted> {
    let mut vec = Vec::new();
    let bytes = len.saturating_mul(size_of::<T>());
    vec.try_reserve_exact(len)
        .map_err(|_| Exhausted { bytes })?;
    Ok(vec)
}

/// `value`, `len` times.
pub fn filled<T: Clone>(value: T, len: usize) -> Result<Vec<T>, Exhausted> {
    let mut vec = with_capacity(len)?;
    vec.resize(len, value);
    Ok(vec)
}

/// The vector of `items`, of which there are `len` at most.
pub fn collected<T>(len: usize, items: impl IntoIterator<Item = T>) -> Result<Vec<T>, Exhausted> {
    let mut vec = with_capacity(len)?;
    vec.extend(items.into_iter().take(len));
    Ok(vec)
}

/// `tokens` in pieces of up to `step`: what `cut` makes of the number of tokens in each, in their order.
pub fn pieces<T>(
    tokens: usize,
    step: usize,
    mut cut: impl FnMut(usize) -> T,
) -> Result<Vec<T>, Exhausted> {
    let firsts = (0..tokens).step_by(step);
    collected(
        tokens.div_ceil(step),
        firsts.map(|first| cut(step.min(tokens - first))),
    )
}
