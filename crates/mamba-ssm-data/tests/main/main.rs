//! The crate as its users see it: files in, batches or errors out.

mod bad_input;
#[cfg(target_os = "linux")]
mod bounds;
#[cfg(any(
    feature = "flex",
    feature = "cuda",
    feature = "rocm",
    feature = "metal",
    feature = "vulkan",
    feature = "wgpu",
    feature = "cpu"
))]
mod device;
#[cfg(feature = "fetch")]
mod fetching;
mod other_readers;
mod properties;
#[cfg(feature = "remote")]
mod remote;
#[cfg(any(feature = "remote", feature = "fetch"))]
mod server;
mod sources;
mod support;
mod unbreakable;
mod whole_way;
