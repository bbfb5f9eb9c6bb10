//! Working memory that threads keep between tasks: allocated once, aligned to cache lines.

use std::cell::Cell;

use super::LANES;

/// One cache line.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; LANES]);

thread_local! {
    static LINES: Cell<Vec<Line>> = const { Cell::new(Vec::new()) };
}

/// Calls `work` with slices of at least these lengths. Their contents are whatever the last task left.
pub(crate) fn with_scratch<const N: usize, R>(
    lengths: [usize; N],
    work: impl FnOnce([&mut [f32]; N]) -> R,
) -> R {
    let lines = lengths.map(|length| length.div_ceil(LANES));
    // Taken out, so that a task within the task would find an empty place and not this memory.
    let mut memory = LINES.take();
    let needed = lines.iter().sum();
    if memory.len() < needed {
        memory.resize(needed, Line([0.0; LANES]));
    }
    let mut rest = memory.as_mut_slice();
    let slices = lines.map(|lines| {
        let (slice, after) = std::mem::take(&mut rest).split_at_mut(lines);
        rest = after;
        floats(slice)
    });
    let result = work(slices);
    LINES.set(memory);
    result
}

fn floats(lines: &mut [Line]) -> &mut [f32] {
    let length = lines.len() * LANES;
    // SAFETY: a `Line` is `LANES` floats without padding, and any bits are floats.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), length) }
}
