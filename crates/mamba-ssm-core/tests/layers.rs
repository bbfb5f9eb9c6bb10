use burn::config::Config;
use burn::tensor::{Device, Distribution, Tensor};
use mamba_ssm_core::{
    Checkpoint, CheckpointError, ConfigError, Mamba1Config, Mamba2Config, MambaLayerConfig,
    MambaStackConfig, StateDict,
};

use crate::support::{assert_close, device, softplus, values};

fn draw(shape: [usize; 3], device: &Device) -> Tensor<3> {
    Tensor::random(shape, Distribution::Normal(0.0, 1.0), device)
}

/// Odd heads, several groups, one head, no norm, biases: nothing has to be a multiple of eight.
fn layers() -> Vec<MambaLayerConfig> {
    let odd = Mamba2Config::new(9).with_headdim(6).with_d_state(5);
    vec![
        odd.clone().into(),
        odd.clone().with_rmsnorm(false).with_bias(true).into(),
        odd.with_norm_before_gate(true).with_conv_bias(false).into(),
        Mamba2Config::new(16)
            .with_headdim(4)
            .with_ngroups(4)
            .with_d_state(3)
            .with_d_has_hdim(true)
            .into(),
        Mamba2Config::new(8)
            .with_headdim(16)
            .with_dt_limit(Some((0.01, 0.05)))
            .into(),
        Mamba1Config::new(7).with_d_state(3).with_d_conv(2).into(),
    ]
}

#[test]
fn whole_split_and_stepped_passes_agree() {
    let device = device(1);
    for layer in layers() {
        for residual in [false, true] {
            let stack = MambaStackConfig::new(layer.clone(), 2)
                .with_residual(residual)
                .init(&device);
            let d_model = match &layer {
                MambaLayerConfig::Mamba1(c) => c.d_model,
                MambaLayerConfig::Mamba2(c) => c.d_model,
            };
            let x = draw([2, 37, d_model], &device);
            let whole = values(&stack.forward(x.clone()));

            let (head, state) =
                stack.forward_from(x.clone().narrow(1, 0, 20), stack.empty_state(2, &device));
            let mut outputs = vec![head];
            let mut state = state;
            for t in 20..37 {
                let (y, next) = stack.step(x.clone().narrow(1, t, 1).squeeze_dim(1), state);
                outputs.push(y.unsqueeze_dim(1));
                state = next;
            }
            let parts = values(&Tensor::cat(outputs, 1));
            assert_close(&format!("{layer:?}"), &parts, &whole, 1e-5);
        }
    }
}

#[test]
fn the_initialisation_is_the_official_one() {
    let device = device(2);
    let layer = Mamba2Config::new(256).with_headdim(2).init(&device);
    let a: Vec<f64> = values(&layer.a_log.val()).iter().map(|a| a.exp()).collect();
    assert!(a.iter().all(|a| (0.999..=16.001).contains(a)));
    let mean = a.iter().sum::<f64>() / a.len() as f64;
    assert!(
        (7.0..10.0).contains(&mean),
        "mean of A in [1, 16] is {mean}"
    );
    let steps: Vec<f64> = values(&layer.dt_bias.val())
        .iter()
        .map(|b| softplus(*b))
        .collect();
    assert!(steps.iter().all(|dt| (0.00099..=0.1001).contains(dt)));
    let below = steps.iter().filter(|dt| **dt < 0.01).count() as f64 / steps.len() as f64;
    assert!(
        (0.35..0.65).contains(&below),
        "log-uniform: half lie below 0.01, found {below}"
    );
    assert!(values(&layer.d.val()).iter().all(|d| *d == 1.0));

    let layer = Mamba1Config::new(8).init(&device);
    let rates = values(&layer.a_log.val());
    for (n, log) in rates.iter().take(16).enumerate() {
        assert!((log.exp() - (n + 1) as f64).abs() < 1e-4);
    }
    assert_eq!(layer.a_log.dims(), [16, 16]);
    assert_eq!(layer.x_proj.weight.dims(), [16, 1 + 32]);
}

#[test]
fn configs_that_cannot_work_are_errors_with_both_numbers() {
    let device = Device::default();
    let error = |config: Mamba2Config| config.try_init(&device).unwrap_err();
    let found = error(Mamba2Config::new(10).with_headdim(16));
    assert_eq!(
        found.to_string(),
        "d_inner = 20 is not a multiple of headdim = 16"
    );
    let found = error(Mamba2Config::new(24).with_headdim(16).with_ngroups(2));
    assert_eq!(
        found.to_string(),
        "nheads = 3 is not a multiple of ngroups = 2"
    );
    let found = error(Mamba2Config::new(16).with_headdim(16).with_d_state(0));
    assert_eq!(found, ConfigError::Zero { field: "d_state" });
    let found = error(Mamba2Config::new(16).with_headdim(16).with_dt_min(0.5));
    assert!(found.to_string().starts_with("dt_min..dt_max = 0.5..0.1"));
    let found = Mamba1Config::new(0).try_init(&device).unwrap_err();
    assert_eq!(found.to_string(), "d_model is 0: expected at least 1");
    let stack = MambaStackConfig::new(Mamba1Config::new(4).into(), 0);
    assert_eq!(
        stack.try_init(&device).unwrap_err(),
        ConfigError::Zero { field: "n_layer" }
    );
}

#[test]
#[should_panic(expected = "d_inner = 20 is not a multiple of headdim = 16")]
fn init_panics_with_the_words_of_try_init() {
    Mamba2Config::new(10)
        .with_headdim(16)
        .init(&Device::default());
}

#[test]
fn configs_survive_their_json() {
    let config = Mamba2Config::new(12).with_dt_limit(Some((0.1, 0.2)));
    let text = serde_json::to_string(&config).unwrap();
    assert_eq!(serde_json::from_str::<Mamba2Config>(&text).unwrap(), config);
    let stack = MambaStackConfig::new(config.into(), 3).with_residual(true);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stack.json");
    stack.save(&path).unwrap();
    assert_eq!(MambaStackConfig::load(&path).unwrap(), stack);
}

#[test]
fn checkpoints_carry_a_stack_by_official_names() {
    let device = device(3);
    for layer in layers() {
        for residual in [false, true] {
            let config = MambaStackConfig::new(layer.clone(), 2).with_residual(residual);
            let (stack, mut other) = (config.init(&device), config.init(&device));
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("model.safetensors");
            stack.state_dict("backbone.").write(&path).unwrap();
            let dict = StateDict::read(&path).unwrap();
            let (first, norm) = match residual {
                true => ("backbone.layers.0.mixer.in_proj.weight", true),
                false => ("backbone.layers.0.mamba.in_proj.weight", false),
            };
            assert!(dict.get(first).is_some());
            assert_eq!(dict.get("backbone.norm_f.weight").is_some(), norm);
            other.load_state_dict("backbone.", &dict).unwrap();
            assert_eq!(other.state_dict(""), stack.state_dict(""));
        }
    }
}

#[test]
fn a_checkpoint_of_another_architecture_changes_nothing() {
    let device = device(4);
    let config = Mamba2Config::new(8).with_headdim(4);
    let dict = config.clone().with_d_state(3).init(&device).state_dict("");
    let mut layer = config.init(&device);
    let before = layer.state_dict("");
    let error = layer.load_state_dict("", &dict).unwrap_err();
    assert!(
        matches!(&error, CheckpointError::Shape { name, .. } if name == "conv1d.bias"),
        "{error}"
    );
    assert_eq!(layer.state_dict(""), before);
}

#[test]
fn loaded_parameters_still_train() {
    let device = device(5).autodiff();
    let config = Mamba2Config::new(8).with_headdim(4);
    let dict = config.init(&device).state_dict("");
    let mut layer = config.init(&device);
    layer.load_state_dict("", &dict).unwrap();
    let grads = layer.forward(draw([1, 5, 8], &device)).sum().backward();
    let names = layer.gradient_dict("", &grads);
    assert_eq!(names.iter().count(), dict.iter().count());
}
