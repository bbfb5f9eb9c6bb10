//! Devices by name.

use burn::tensor::Device;

use crate::{Error, Result};

/// The names this build understands, for messages.
fn known() -> Vec<&'static str> {
    let mut names = Vec::new();
    if cfg!(feature = "flex") {
        names.push("cpu");
    }
    for (name, built) in [
        ("cuda:N", cfg!(feature = "cuda")),
        ("rocm:N", cfg!(feature = "rocm")),
        ("vulkan", cfg!(feature = "vulkan")),
        ("metal", cfg!(feature = "metal")),
        ("wgpu", cfg!(feature = "wgpu")),
        ("cubecl-cpu", cfg!(feature = "cpu")),
    ] {
        if built {
            names.push(name);
        }
    }
    names
}

/// The device of that name: `cpu` (pure Rust), `cuda:0`, `rocm:0`, `vulkan`, `metal`, `wgpu`,
/// `cubecl-cpu`, or `default` (the fastest this build knows). A GPU without a number is number 0.
///
/// # Errors
///
/// When the name is unknown or this build has no such backend.
pub fn device(name: &str) -> Result<Device> {
    let (kind, index) = name.split_once(':').unwrap_or((name, "0"));
    let index: usize = index
        .parse()
        .map_err(|_| Error::Usage(format!("--device {name}: `{index}` is not a device number")))?;
    // Read only in builds that have a backend with numbered devices.
    let _ = index;
    match kind {
        "default" => Ok(Device::default()),
        #[cfg(feature = "flex")]
        "cpu" | "flex" => Ok(Device::flex()),
        #[cfg(feature = "cuda")]
        "cuda" => Ok(Device::cuda(index)),
        #[cfg(feature = "rocm")]
        "rocm" => Ok(Device::rocm(index)),
        #[cfg(feature = "vulkan")]
        "vulkan" => Ok(Device::vulkan(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "metal")]
        "metal" => Ok(Device::metal(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "wgpu")]
        "wgpu" => Ok(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "cpu")]
        "cubecl-cpu" => Ok(Device::cpu()),
        _ => Err(Error::Usage(format!(
            "--device {name}: this build knows {}; build with `--features cuda` (or rocm, vulkan, metal, \
             wgpu) for others",
            known().join(", ")
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_device_names_those_that_are_known() {
        let error = device("abacus").unwrap_err().to_string();
        assert!(error.contains("abacus") && error.contains("cpu"), "{error}");
        let error = device("cuda:one").unwrap_err().to_string();
        assert!(error.contains("`one` is not a device number"), "{error}");
    }
}
