//! Attention with cubek-attention's kernels: what there was to be had before kernels of our own.
//!
//! `cargo bench -p benches --features cuda,cubek --bench cubek`. Both passes through autodiff, with the log-sum-exp that
//! they lack between them, and the backward pass alone; f32, the one type that has. Times do not depend on the numbers.

use benches::cubek::cubek_attention;
use benches::{ATTENTION, both, config, draw, leaf, queue};
use burn::tensor::{DType, Device};
use criterion::{Criterion, criterion_group, criterion_main};
use cubecl::prelude::*;
use cubecl::std::tensor::TensorHandle;
use cubek_attention::backward::{BackwardConfig, flash_attention_backward};
use cubek_attention::forward::definition::AttentionGlobalTypes;

fn through_autodiff(c: &mut Criterion) {
    let mut group = c.benchmark_group("cubek-attention");
    for shape in ATTENTION {
        let [b, h, l, d] = shape;
        let name = format!("B{b} H{h} L{l} D{d}, f32");
        let operand = |device: &Device| leaf(draw(shape, device).cast(DType::F32));
        let inputs = |device: &Device| [(); 3].map(|()| operand(device));
        both(&mut group, &name, inputs, cubek_attention);
    }
    group.finish();
}

fn backward(c: &mut Criterion) {
    let client = cubecl::Device::default().client();
    let dtype = f32::elem_type_native();
    let types = AttentionGlobalTypes::from_single_float_dtype(
        dtype,
        AttentionGlobalTypes::mask_dtype(&client),
    );
    // The same one: what Burn waits for is what this client has queued.
    let device = Device::default();
    let mut group = c.benchmark_group("cubek-attention, kernels alone");
    for [b, h, l, d] in ATTENTION {
        let [q, k, v, out, dout, dq, dk, dv] =
            [(); 8].map(|()| TensorHandle::zeros(&client, [b, h, l, d], dtype));
        let lse = TensorHandle::zeros(&client, [b, h, l], dtype);
        let config = BackwardConfig {
            causal: true,
            ..BackwardConfig::from_head_dim(d)
        };
        let run = || {
            let read = [&q, &k, &v, &out, &lse, &dout].map(|tensor| tensor.clone().binding());
            let [q, k, v, out, lse, dout] = read;
            let [dq, dk, dv] = [&dq, &dk, &dv].map(|tensor| tensor.clone().binding());
            let config = config.clone();
            flash_attention_backward(&client, q, k, v, out, lse, dout, dq, dk, dv, &types, config)
                .expect("a size it has");
        };
        group.bench_function(format!("B{b} H{h} L{l} D{d}, f32/backward"), |bench| {
            bench.iter_custom(|calls| queue(&device, calls, run));
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = config();
    targets = through_autodiff, backward
}
criterion_main!(benches);
