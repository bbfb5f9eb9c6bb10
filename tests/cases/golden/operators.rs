use burn::tensor::{Device, Gradients, Tensor};
use mamba_ssm_core::{
    ScanInput, ScanOptions, SkipWeight, SsdInput, SsdOptions, selective_scan, ssd,
};

use super::{Case, CaseKind, GRADIENT, OUTPUT, for_each};

#[test]
fn golden_selective_scan() {
    for_each(CaseKind::SelectiveScan, check_scan);
}

/// The chunk size must not change results: one that divides nothing, the default, and one chunk.
#[test]
fn golden_ssd() {
    for_each(CaseKind::Ssd, |case| {
        for chunk_size in [17, 64, 256] {
            check_ssd(case, chunk_size);
        }
    });
}

fn check_scan(case: &Case) {
    let device = Device::default().autodiff();
    let input = ScanInput {
        u: case.need("u", &device),
        delta: case.need("delta", &device),
        a: case.need("A", &device),
        b: case.need("B", &device),
        c: case.need("C", &device),
        d: case.operand("D", &device),
        z: case.operand("z", &device),
        delta_bias: case.operand("delta_bias", &device),
        initial_state: case.operand("initial_state", &device),
    };
    let options = ScanOptions {
        delta_softplus: case.flag("delta_softplus"),
    };
    let out = selective_scan(input.clone(), &options);
    case.assert_close("out", out.y.clone().inner(), OUTPUT);
    case.assert_close_if("last_state", out.final_state.inner(), OUTPUT);
    if !case.has("dout") {
        return;
    }
    let dout = case.tensor::<3>("dout", &device);
    let grads = (out.y * dout).sum().backward();
    let gradient = |name: &str, found: Option<Tensor<3>>| assert_gradient(case, name, found);
    gradient("u", input.u.grad(&grads));
    gradient("delta", input.delta.grad(&grads));
    assert_gradient(case, "A", input.a.grad(&grads));
    assert_gradient(case, "B", input.b.grad(&grads));
    assert_gradient(case, "C", input.c.grad(&grads));
    assert_gradient(case, "D", input.d.and_then(|t| t.grad(&grads)));
    gradient("z", input.z.and_then(|t| t.grad(&grads)));
    assert_gradient(
        case,
        "delta_bias",
        input.delta_bias.and_then(|t| t.grad(&grads)),
    );
    gradient(
        "initial_state",
        input.initial_state.and_then(|t| t.grad(&grads)),
    );
}

fn check_ssd(case: &Case, chunk_size: usize) {
    let device = Device::default().autodiff();
    let d = case.has("D").then(|| match case.named("D").shape.len() {
        1 => SkipWeight::PerHead(case.operand("D", &device).expect("D is there")),
        _ => SkipWeight::PerChannel(case.operand("D", &device).expect("D is there")),
    });
    let input = SsdInput {
        x: case.need("x", &device),
        dt: case.need("dt", &device),
        a: case.need("A", &device),
        b: case.need("B", &device),
        c: case.need("C", &device),
        d,
        z: case.operand("z", &device),
        dt_bias: case.operand("dt_bias", &device),
        initial_state: case.operand("initial_states", &device),
    };
    let dt_limit = match case.has("dt_limit") {
        true => {
            let limit = &case.named("dt_limit").values;
            (f64::from(limit[0]), f64::from(limit[1]))
        }
        false => (0.0, f64::INFINITY),
    };
    let options = SsdOptions {
        chunk_size,
        dt_softplus: case.flag("dt_softplus"),
        dt_limit,
    };
    let out = ssd(input.clone(), &options);
    case.assert_close("out", out.y.clone().inner(), OUTPUT);
    case.assert_close_if("final_state", out.final_state.inner(), OUTPUT);
    if case.has("dout") {
        let dout = case.tensor::<4>("dout", &device);
        let grads = (out.y * dout).sum().backward();
        assert_ssd_gradients(case, input, &grads);
    }
}

fn assert_ssd_gradients(case: &Case, input: SsdInput, grads: &Gradients) {
    assert_gradient(case, "x", input.x.grad(grads));
    assert_gradient(case, "dt", input.dt.grad(grads));
    assert_gradient(case, "A", input.a.grad(grads));
    assert_gradient(case, "B", input.b.grad(grads));
    assert_gradient(case, "C", input.c.grad(grads));
    match input.d {
        Some(SkipWeight::PerHead(d)) => assert_gradient(case, "D", d.grad(grads)),
        Some(SkipWeight::PerChannel(d)) => assert_gradient(case, "D", d.grad(grads)),
        None => {}
    }
    assert_gradient(case, "z", input.z.and_then(|t| t.grad(grads)));
    assert_gradient(case, "dt_bias", input.dt_bias.and_then(|t| t.grad(grads)));
    assert_gradient(
        case,
        "initial_states",
        input.initial_state.and_then(|t| t.grad(grads)),
    );
}

/// Wherever the case states a gradient there must be one, and it must agree.
fn assert_gradient<const D: usize>(case: &Case, name: &str, found: Option<Tensor<D>>) {
    let key = format!("grad_{name}");
    if case.has(&key) {
        let found = found.unwrap_or_else(|| panic!("case {}: no gradient of {name}", case.name));
        case.assert_close(&key, found, GRADIENT);
    }
}
