//! One Mamba-2 layer in a program of one's own: a sequence at once, then token by token.
//!
//! `cargo run --release --example minimal`

use burn::tensor::{Device, Distribution, Tensor};
use mamba_ssm_core::Mamba2Config;

fn main() {
    let device = Device::default();
    let layer = Mamba2Config::new(64)
        .with_d_state(64)
        .with_headdim(16)
        .with_expand(4)
        .init(&device);

    // [batch, length, d_model]
    let x = Tensor::<3>::random([1, 300, 64], Distribution::Default, &device);
    let y = layer.forward(x.clone());
    println!("whole sequence: {:?}", y.dims());

    // The same tokens one by one: the state's size does not depend on how many came before.
    let mut state = layer.empty_state(1, &device);
    let mut last = None;
    for t in 0..300 {
        let token = x.clone().narrow(1, t, 1).squeeze_dim(1);
        let (y_t, next) = layer.step(token, state);
        (last, state) = (Some(y_t), next);
    }

    let whole = y.narrow(1, 299, 1).squeeze_dim::<2>(1);
    let difference = (whole - last.expect("300 tokens")).abs().max();
    println!(
        "last token, both ways, differs by at most {:.1e}",
        difference.into_scalar::<f32>()
    );
}
