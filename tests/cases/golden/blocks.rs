use burn::tensor::{Device, Tensor};
use mamba_ssm_core::{
    Checkpoint, Mamba1Config, Mamba2Config, MambaLayer, MambaLayerConfig, MambaStack,
    MambaStackConfig, StackState, StateDict,
};

use mamba_ssm_examples::forecaster::{Kind, ModelConfig};
use mamba_ssm_examples::preset::Preset;
use mamba_ssm_train::{masked_huber, next_step};

use super::{Case, GRADIENT, OUTPUT, cases};

#[test]
fn golden_layers() {
    let mut layers = 0;
    for case in cases("blocks.safetensors") {
        if let Some(config) = layer_config(&case) {
            check_layer(&case, config);
            layers += 1;
        }
    }
    assert!(layers > 0, "the golden folder holds no layer");
}

#[test]
fn golden_forecaster() {
    let forecasters: Vec<Case> = cases("blocks.safetensors")
        .into_iter()
        .filter(|case| case.has("param.input_projection.weight"))
        .collect();
    assert!(
        !forecasters.is_empty(),
        "the golden folder holds no forecaster"
    );
    forecasters.iter().for_each(check_forecaster);
}

/// The note's whole model, with its masked loss on the next row.
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

/// The note's settings, sizes from the parameters' shapes.
fn forecaster_config(case: &Case) -> (ModelConfig, usize) {
    let shape = |name: &str| case.named(&format!("param.{name}")).shape.clone();
    let (d_model, inputs) = match shape("input_projection.weight")[..] {
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

/// The layer's configuration, from what the case states and, where it is silent, from shapes.
fn layer_config(case: &Case) -> Option<MambaLayerConfig> {
    let size = |name: &str| case.size(&format!("config.{name}"));
    let d_model = size("d_model")?;
    let has = |name: &str| case.has(&format!("param.{name}"));
    if let Some(headdim) = size("headdim") {
        let mut config = Mamba2Config::new(d_model)
            .with_headdim(headdim)
            .with_rmsnorm(has("norm.weight"))
            .with_bias(has("in_proj.bias"))
            .with_conv_bias(has("conv1d.bias"));
        config.d_state = size("d_state").unwrap_or(config.d_state);
        config.d_conv = size("d_conv").unwrap_or(config.d_conv);
        config.expand = size("expand").unwrap_or(config.expand);
        config.ngroups = size("ngroups").unwrap_or(config.ngroups);
        config.d_has_hdim = case.named("param.D").shape != case.named("param.A_log").shape;
        config.norm_before_gate = size("norm_before_gate").is_some_and(|flag| flag != 0);
        return Some(config.into());
    }
    let mut config = Mamba1Config::new(d_model)
        .with_bias(has("in_proj.bias"))
        .with_conv_bias(has("conv1d.bias"));
    config.d_state = size("d_state").unwrap_or(config.d_state);
    config.d_conv = size("d_conv").unwrap_or(config.d_conv);
    config.expand = size("expand").unwrap_or(config.expand);
    config.dt_rank = size("dt_rank");
    Some(config.into())
}

/// A layer is tested as a plain stack of one: the names below `layers.0.mamba.` are the layer's own.
fn check_layer(case: &Case, config: MambaLayerConfig) {
    let device = Device::default().autodiff();
    let mut stack = MambaStackConfig::new(config, 1).init(&device);
    load(&mut stack, &case.below("param."));

    let input = case.tensor::<3>("input", &device).require_grad();
    let out = stack.forward(input.clone());
    case.assert_close("out", out.clone().inner(), OUTPUT);

    let dout = case.tensor::<3>("dout", &device);
    let grads = (out * dout).sum().backward();
    let dx = input.grad(&grads).expect("the input is tracked");
    case.assert_close("grad_input", dx, GRADIENT);
    assert_gradients(case, "layers.0.mamba.", &stack.gradient_dict("", &grads));
    check_steps(case, &stack, input.inner());
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

/// Token by token: the outputs, and the states behind them.
fn check_steps(case: &Case, stack: &MambaStack, input: Tensor<3>) {
    let stack = burn::module::Module::valid(stack);
    let [batch, length, _] = input.dims();
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
            case.assert_close("ssm_state", state.ssm, OUTPUT);
        }
        LayerState::Mamba2(state) => {
            conv(state.conv);
            case.assert_close("ssm_state", state.ssm, OUTPUT);
        }
    }
}
