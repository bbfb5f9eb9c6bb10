//! Memory of the CPU: for large results, and what lies on another device brought there.

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
    fn zeros_of_every_size() {
        for length in [0, 1, 1000, (5 << 20) / 4 + 3] {
            let mut values = zeros::<f32>(length);
            assert!(values.len() == length && values.iter().all(|v| *v == 0.0));
            values.iter_mut().for_each(|v| *v = 1.0);
        }
    }
}
