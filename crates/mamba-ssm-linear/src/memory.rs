//! Memory of the CPU: for large results and for what a call needs on the way to them, and what lies on
//! another device brought there.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

use burn::tensor::{DType, Tensor};

/// Results from this size on ask for large pages: below it, few of them would fit.
#[cfg(target_os = "linux")]
const LARGE: usize = 4 << 20;

/// Zeros, in large pages where the system has them and the result is worth it.
///
/// An allocator gives memory of this size back to the system as soon as it is free, so every call gets
/// it page by page again: with pages of 4 KiB that took up to half of a layer's time.
pub fn zeros<T: Copy + Default>(length: usize) -> Vec<T> {
    let values = vec![T::default(); length];
    advise(&values);
    values
}

/// Numbers of working memory that are kept for later calls, all together: 64 MiB.
const KEPT: usize = 16 << 20;

/// Working memory that no call uses.
static FREE: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());

/// Large working memory of a call, which hands it on to later calls when it is dropped: memory that goes
/// back to the system comes again page by page, and that takes longer than to write it.
#[derive(Debug)]
pub struct Working {
    values: Vec<f32>,
    length: usize,
}

/// Memory of this length; its contents are whatever the last call left.
pub fn working(length: usize) -> Working {
    let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
    let fitting = free.iter().enumerate();
    let best = fitting
        .filter(|(_, values)| values.len() >= length)
        .min_by_key(|(_, values)| values.len())
        .map(|(index, _)| index);
    let values = best.map(|index| free.remove(index));
    drop(free);
    Working {
        values: values.unwrap_or_else(|| zeros(length)),
        length,
    }
}

impl Deref for Working {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.values[..self.length]
    }
}

impl DerefMut for Working {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.values[..self.length]
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        free.push(std::mem::take(&mut self.values));
        // The oldest go first, so that sizes which are no longer asked for do not stay.
        while free.iter().map(Vec::len).sum::<usize>() > KEPT {
            free.remove(0);
        }
    }
}

/// All elements in f32, row by row.
///
/// # Panics
///
/// When the device cannot be read.
pub fn host<const D: usize>(tensor: &Tensor<D>) -> Vec<f32> {
    tensor
        .to_data_dtype(DType::F32)
        .try_to_vec::<f32>()
        .expect("converted to f32")
}

#[cfg(target_os = "linux")]
fn advise<T>(values: &[T]) {
    let bytes = std::mem::size_of_val(values);
    if bytes < LARGE {
        return;
    }
    let page = 4096;
    let start = (values.as_ptr() as usize).next_multiple_of(page);
    let end = (values.as_ptr() as usize + bytes) / page * page;
    // SAFETY: the advice changes no contents, and the range lies within the allocation. Where it is not
    // taken, nothing happens.
    unsafe {
        libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE);
    }
}

#[cfg(not(target_os = "linux"))]
fn advise<T>(_values: &[T]) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn working_memory_has_the_length_that_was_asked_for() {
        let mut first = working(1000);
        first.fill(1.0);
        let second = working(10);
        assert_eq!((first.len(), second.len()), (1000, 10));
        drop((first, second));
        assert_eq!(working(999).len(), 999);
        drop(working(KEPT + 1));
        let free = FREE.lock().unwrap();
        assert!(free.iter().map(Vec::len).sum::<usize>() <= KEPT);
    }

    #[test]
    fn zeros_of_every_size() {
        for length in [0, 1, 1000, (5 << 20) / 4 + 3] {
            let mut values = zeros::<f32>(length);
            assert!(values.len() == length && values.iter().all(|v| *v == 0.0));
            values.iter_mut().for_each(|v| *v = 1.0);
        }
    }
}
