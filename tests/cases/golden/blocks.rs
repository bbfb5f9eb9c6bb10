use burn::tensor::{Device, Tensor};
use mamba_ssm_core::{
    Checkpoint, Mamba1Config, Mamba2Config, MambaLayer, MambaLayerConfig, MambaStack,
    MambaStackConfig, StackState, StateDict,
};

use mamba_ssm_examples::forecaster::{Kind, ModelConfig};
use mamba_ssm_examples::preset::Preset;
use mamba_ssm_train::{masked_huber, next_step};

use super::{Case, CaseKind, GRADIENT, OUTPUT, for_each};

#[test]
fn golden_layers() {
    for_each(CaseKind::Layer, |case| {
        check_layer(case, layer_config(case))
    });
}

#[test]
fn golden_layers_without_stated_sizes_are_read_from_their_shapes() {
    let sizes = [
        "d_model", "d_state", "d_conv", "expand", "headdim", "dt_rank",
    ];
    let names = sizes.map(|name| format!("config.{name}"));
    for_each(CaseKind::Layer, |case| {
        let silent = case.without(&names.each_ref().map(String::as_str));
        assert_eq!(layer_config(&silent), layer_config(case), "{}", case.name);
        // The gradients belong to the other test.
        case.below("grad");
    });
}

#[test]
fn golden_forecaster() {
    for_each(CaseKind::Forecaster, check_forecaster);
}

/// The published note's whole model, with its masked loss on the next row.
fn check_forecaster(case: &Case) {
    let device = Device::default().autodiff();
    let (config, inputs) = forecaster_config(case);
    let mut model = config
        .init(inputs, inputs, &device)
        .expect("a model that works");
    let dict = case.below("param.");
    model
        .load_state_dict("", &dict)
        .expect("official names and shapes");
    assert_eq!(
        model.state_dict(""),
        dict,
        "what was loaded is written back"
    );

    let input = case.tensor::<3>("input", &device);
    let out = model.forward(input.clone());
    case.assert_close("out", out.clone().inner(), OUTPUT);

    if !case.has("loss") {
        return;
    }
    let (prediction, target, mask) = next_step(out, input, case.tensor::<2>("mask", &device));
    let loss = masked_huber(
        prediction,
        target,
        mask,
        &Preset::Note.config(Kind::Mamba2).train.loss,
    );
    case.assert_close("loss", loss.clone().inner(), OUTPUT);
    let found = model.gradient_dict("", &loss.backward());
    assert_gradients(case, "", &found);
}

/// The published note's settings, sizes from the parameters' shapes.
fn forecaster_config(case: &Case) -> (ModelConfig, usize) {
    let shape = |name: &str| case.shape(&format!("param.{name}"));
    let (d_model, inputs) = match *shape("input_projection.weight") {
        [d_model, inputs] => (d_model, inputs),
        ref other => panic!("input_projection.weight has shape {other:?}"),
    };
    let d_inner = shape("layers.0.mamba.norm.weight")[0];
    let conv = shape("layers.0.mamba.conv1d.weight");
    let ngroups = case.size("config.ngroups").unwrap_or(1);
    let layers = (0..).take_while(|n| case.has(&format!("param.layers.{n}.mamba.A_log")));
    let config = ModelConfig {
        d_model,
        n_layer: layers.count(),
        expand: d_inner / d_model,
        headdim: d_inner / shape("layers.0.mamba.A_log")[0],
        d_conv: conv[2],
        ngroups,
        d_state: (conv[0] - d_inner) / (2 * ngroups),
        ..ModelConfig::default()
    };
    (config, inputs)
}

/// The layer's configuration, from the shapes of its parameters and, where those are silent (groups of heads,
/// the order of gate and norm, limits of dt), from what the case states.
fn layer_config(case: &Case) -> MambaLayerConfig {
    let config = match case.has("param.dt_proj.weight") {
        true => mamba1_config(case).into(),
        false => mamba2_config(case).into(),
    };
    assert_stated(case, &config);
    config
}

fn mamba1_config(case: &Case) -> Mamba1Config {
    let has = |name: &str| case.has(&format!("param.{name}"));
    let shape = |name: &str| case.shape(&format!("param.{name}"));
    let (d_inner, d_model) = (shape("in_proj.weight")[0] / 2, shape("in_proj.weight")[1]);
    let mut config = Mamba1Config::new(d_model)
        .with_bias(has("in_proj.bias"))
        .with_conv_bias(has("conv1d.bias"));
    config.expand = d_inner / d_model;
    config.d_state = shape("A_log")[1];
    config.d_conv = shape("conv1d.weight")[2];
    config.dt_rank = Some(shape("dt_proj.weight")[1]);
    config
}

fn mamba2_config(case: &Case) -> Mamba2Config {
    let has = |name: &str| case.has(&format!("param.{name}"));
    let shape = |name: &str| case.shape(&format!("param.{name}"));
    let (d_inner, d_model) = (shape("out_proj.weight")[1], shape("in_proj.weight")[1]);
    let nheads = shape("A_log")[0];
    let ngroups = case.size("config.ngroups").unwrap_or(1);
    let mut config = Mamba2Config::new(d_model)
        .with_headdim(d_inner / nheads)
        .with_ngroups(ngroups)
        .with_rmsnorm(has("norm.weight"))
        .with_bias(has("in_proj.bias"))
        .with_conv_bias(has("conv1d.bias"));
    config.expand = d_inner / d_model;
    config.d_state = (shape("conv1d.weight")[0] - d_inner) / (2 * ngroups);
    config.d_conv = shape("conv1d.weight")[2];
    config.d_has_hdim = shape("D") != shape("A_log");
    config.norm_before_gate = case.flag("config.norm_before_gate");
    if case.has("config.dt_limit") {
        let limit = &case.named("config.dt_limit").values;
        config.dt_limit = Some((f64::from(limit[0]), f64::from(limit[1])));
    }
    config
}

/// What the case states about sizes must be what its shapes say.
fn assert_stated(case: &Case, config: &MambaLayerConfig) {
    let (sizes, own) = match config {
        MambaLayerConfig::Mamba1(c) => (
            [c.d_model, c.d_state, c.d_conv, c.expand],
            ("dt_rank", c.dt_rank),
        ),
        MambaLayerConfig::Mamba2(c) => (
            [c.d_model, c.d_state, c.d_conv, c.expand],
            ("headdim", Some(c.headdim)),
        ),
    };
    let names = ["d_model", "d_state", "d_conv", "expand"];
    let read = names.into_iter().zip(sizes.map(Some)).chain([own]);
    for (name, read) in read {
        if let Some(stated) = case.size(&format!("config.{name}")) {
            assert_eq!(Some(stated), read, "case {}: {name}", case.name);
        }
    }
}

/// A layer is tested as a plain stack of one: the names below `layers.0.mamba.` are the layer's own.
fn check_layer(case: &Case, config: MambaLayerConfig) {
    let device = Device::default().autodiff();
    let mut stack = MambaStackConfig::new(config, 1).init(&device);
    load(&mut stack, &case.below("param."));

    let input = case.tensor::<3>("input", &device).require_grad();
    let out = stack.forward(input.clone());
    case.assert_close("out", out.clone().inner(), OUTPUT);
    if case.has("dout") {
        let dout = case.tensor::<3>("dout", &device);
        let grads = (out * dout).sum().backward();
        let dx = input.grad(&grads).expect("the input is tracked");
        case.assert_close_if("grad_input", dx, GRADIENT);
        assert_gradients(case, "layers.0.mamba.", &stack.gradient_dict("", &grads));
    }
    if case.has("step_out") {
        check_steps(case, &stack, input.inner());
    }
}

/// Every gradient the case states, found below `prefix`.
fn assert_gradients(case: &Case, prefix: &str, found: &StateDict) {
    for (name, expected) in case.below("grad.").iter() {
        let found = found
            .get(&format!("{prefix}{name}"))
            .unwrap_or_else(|| panic!("case {}: no gradient of {name}", case.name));
        assert_eq!(found.shape, expected.shape, "gradient of {name}");
        case.assert_values(name, &found.values, &expected.values, GRADIENT);
    }
}

fn load(stack: &mut MambaStack, layer: &StateDict) {
    let mut dict = StateDict::default();
    for (name, tensor) in layer.iter() {
        dict.insert(format!("layers.0.mamba.{name}"), tensor.clone());
    }
    stack
        .load_state_dict("", &dict)
        .expect("official names and shapes");
    assert_eq!(
        stack.state_dict(""),
        dict,
        "what was loaded is written back"
    );
}

/// Token by token, as many as the case has outputs of: the outputs, and the states behind them.
fn check_steps(case: &Case, stack: &MambaStack, input: Tensor<3>) {
    let stack = burn::module::Module::valid(stack);
    let (batch, length) = (input.dims()[0], case.shape("step_out")[1]);
    let mut state = stack.empty_state(batch, &input.device());
    let mut outputs = Vec::new();
    for t in 0..length {
        let token = input.clone().narrow(1, t, 1).squeeze_dim(1);
        let (y, next) = stack.step(token, state);
        outputs.push(y);
        state = next;
    }
    case.assert_close("step_out", Tensor::stack::<3>(outputs, 1), OUTPUT);
    assert_state(case, &stack, state);
}

/// The official convolution state keeps one token more than a next step needs; the others must agree.
fn assert_state(case: &Case, stack: &MambaStack, state: StackState) {
    use mamba_ssm_core::stack::LayerState;
    let conv = |conv: Tensor<3>| {
        if !case.has("conv_state") {
            return;
        }
        let official = case.tensor::<3>("conv_state", &conv.device());
        let [.., width] = official.dims();
        let expected = official.narrow(2, 1, width - 1).swap_dims(1, 2);
        let values = |t: Tensor<3>| t.into_data().try_to_vec::<f32>().expect("f32 tensors");
        case.assert_values("conv_state", &values(conv), &values(expected), OUTPUT);
    };
    assert!(matches!(
        (&stack.layers[0], &state[0]),
        (MambaLayer::Mamba1(_), LayerState::Mamba1(_))
            | (MambaLayer::Mamba2(_), LayerState::Mamba2(_))
    ));
    match state.into_iter().next().expect("one layer") {
        LayerState::Mamba1(state) => {
            conv(state.conv);
            case.assert_close_if("ssm_state", state.ssm, OUTPUT);
        }
        LayerState::Mamba2(state) => {
            conv(state.conv);
            case.assert_close_if("ssm_state", state.ssm, OUTPUT);
        }
    }
}
