//! Checkpoints shaped like the published language models.

use burn::tensor::Device;

use super::{Checkpoint, CheckpointError, NamedTensor, StateDict};
use crate::{Mamba1Config, Mamba2Config, MambaLayerConfig, MambaStackConfig};

const D_MODEL: usize = 16;
const VOCABULARY: usize = 50;

/// Names and shapes of a published model of two layers, each value a number of its own.
fn published(mixer: &[(&str, Vec<usize>)]) -> StateDict {
    let mut shapes = vec![
        (
            "backbone.embedding.weight".to_owned(),
            vec![VOCABULARY, D_MODEL],
        ),
        ("backbone.norm_f.weight".to_owned(), vec![D_MODEL]),
        ("lm_head.weight".to_owned(), vec![VOCABULARY, D_MODEL]),
    ];
    for layer in 0..2 {
        shapes.push((
            format!("backbone.layers.{layer}.norm.weight"),
            vec![D_MODEL],
        ));
        for (name, shape) in mixer {
            shapes.push((
                format!("backbone.layers.{layer}.mixer.{name}"),
                shape.clone(),
            ));
        }
    }
    let mut dict = StateDict::default();
    let mut next = 0.0;
    for (name, shape) in shapes {
        let count = shape.iter().product();
        let values = std::iter::repeat_with(|| {
            next += 1e-3;
            next
        });
        let values = values.take(count).collect();
        dict.insert(name, NamedTensor { shape, values });
    }
    dict
}

/// 2 x 16 inner channels in heads of 8, a state of 6, one group.
fn mamba2() -> (MambaLayerConfig, StateDict) {
    let config = Mamba2Config::new(D_MODEL).with_headdim(8).with_d_state(6);
    let dict = published(&[
        ("A_log", vec![4]),
        ("D", vec![4]),
        ("dt_bias", vec![4]),
        ("conv1d.bias", vec![44]),
        ("conv1d.weight", vec![44, 1, 4]),
        ("in_proj.weight", vec![2 * 32 + 2 * 6 + 4, D_MODEL]),
        ("norm.weight", vec![32]),
        ("out_proj.weight", vec![D_MODEL, 32]),
    ]);
    (config.into(), dict)
}

/// 2 x 16 inner channels, a state of 6, dt of rank 1.
fn mamba1() -> (MambaLayerConfig, StateDict) {
    let dict = published(&[
        ("A_log", vec![32, 6]),
        ("D", vec![32]),
        ("conv1d.bias", vec![32]),
        ("conv1d.weight", vec![32, 1, 4]),
        ("dt_proj.bias", vec![32]),
        ("dt_proj.weight", vec![32, 1]),
        ("in_proj.weight", vec![64, D_MODEL]),
        ("out_proj.weight", vec![D_MODEL, 32]),
        ("x_proj.weight", vec![1 + 2 * 6, 32]),
    ]);
    (Mamba1Config::new(D_MODEL).with_d_state(6).into(), dict)
}

#[test]
fn the_layers_of_a_published_language_model_load() {
    for (layer, mut dict) in [mamba1(), mamba2()] {
        let config = MambaStackConfig::new(layer, 2).with_residual(true);
        let mut stack = config.init(&Device::default());
        let fresh = stack.state_dict("");

        let error = stack.load_state_dict("backbone.", &dict).unwrap_err();
        assert!(
            matches!(&error, CheckpointError::Unexpected { name } if name == "backbone.embedding.weight"),
            "{error}"
        );
        assert!(error.to_string().contains("load_part"), "{error}");
        assert_eq!(stack.state_dict(""), fresh, "a refusal changes nothing");

        let left = stack.load_part("backbone.", &dict).unwrap();
        assert_eq!(left, ["backbone.embedding.weight"]);
        let loaded = stack.state_dict("backbone.");
        assert_ne!(loaded, fresh);
        for (name, tensor) in loaded.iter() {
            assert_eq!(dict.get(name), Some(tensor), "{name}");
        }
        assert_eq!(loaded.iter().count() + 2, dict.iter().count());

        // The strict way: what is no layer is taken out first.
        assert!(dict.remove("backbone.embedding.weight").is_some());
        let mut strict = config.init(&Device::default());
        strict.load_state_dict("backbone.", &dict).unwrap();
        assert_eq!(strict.state_dict("backbone."), loaded);
    }
}

#[test]
fn a_part_of_a_deeper_model_is_its_first_layers() {
    let (layer, dict) = mamba2();
    let mut first = MambaStackConfig::new(layer, 1)
        .with_residual(true)
        .init(&Device::default());
    let left = first.load_part("backbone.", &dict).unwrap();
    assert_eq!(left.len(), 1 + 9, "{left:?}");
    assert!(
        left[1..]
            .iter()
            .all(|name| name.starts_with("backbone.layers.1."))
    );
}

#[test]
fn a_part_must_be_whole() {
    let (layer, dict) = mamba2();
    let config = MambaStackConfig::new(layer, 3).with_residual(true);
    let mut deeper = config.init(&Device::default());
    let before = deeper.state_dict("");
    let error = deeper.load_part("backbone.", &dict).unwrap_err();
    assert!(error.to_string().contains("backbone.layers.2."), "{error}");
    assert_eq!(deeper.state_dict(""), before);

    let (other, _) = mamba1();
    let mut other = MambaStackConfig::new(other, 2)
        .with_residual(true)
        .init(&Device::default());
    let error = other.load_part("backbone.", &dict).unwrap_err();
    assert!(
        error.to_string().contains("another architecture"),
        "{error}"
    );
}
