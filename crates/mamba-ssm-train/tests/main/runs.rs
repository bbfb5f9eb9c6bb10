//! Training, stopping, resuming and failing.

use std::path::Path;
use std::sync::{Arc, Mutex};

use burn::module::Module;
use burn::tensor::Device;
use mamba_ssm_train::{
    BatchSource, CheckpointKind, EpochRecord, Fit, Forecaster, Outcome, Precision, StopFlag,
    TrainConfig, TrainError, Trainer, load_model, load_state, masked_huber, read_history,
};

use crate::support::{Heard, Listener, Tiny, Waves, alone, config, values};

fn fit(config: TrainConfig, run: &Path, model: Tiny, source: &mut Waves) -> Fit<Tiny> {
    Trainer::new(config, run)
        .unwrap()
        .fit(model, source)
        .unwrap()
}

fn resume(config: TrainConfig, run: &Path, source: &mut Waves) -> Fit<Tiny> {
    // Another instance with other initial values, as after a restart.
    let mut trainer = Trainer::new(config, run).unwrap();
    trainer.resume(Tiny::new(4), source).unwrap()
}

/// Stops after optimizer step `step`.
fn fit_until(
    config: TrainConfig,
    run: &Path,
    model: Tiny,
    source: &mut Waves,
    step: usize,
) -> Fit<Tiny> {
    let flag = StopFlag::new();
    let listener = Listener {
        heard: Arc::default(),
        stop_at: Some((step, flag.clone())),
    };
    Trainer::new(config, run)
        .unwrap()
        .with_stop_flag(flag)
        .with_reporter(Box::new(listener))
        .fit(model, source)
        .unwrap()
}

/// A model whose initial values can be used twice.
fn initial() -> Tiny {
    let model = Tiny::new(4);
    values(&model);
    model
}

/// Everything but the times.
fn losses(history: &[EpochRecord]) -> Vec<(usize, usize, f64, f64, f64)> {
    let row = |r: &EpochRecord| (r.epoch, r.step, r.train_loss, r.val_loss, r.lr);
    history.iter().map(row).collect()
}

#[test]
fn a_run_learns_and_leaves_its_files() {
    let _alone = alone();
    let run = tempfile::tempdir().unwrap();
    let heard = Arc::new(Mutex::new(Heard::default()));
    let listener = Listener {
        heard: heard.clone(),
        stop_at: None,
    };
    let mut source = Waves::new(5);
    Device::default().seed(1);
    let fit = Trainer::new(config(8), run.path())
        .unwrap()
        .with_reporter(Box::new(listener))
        .fit(initial(), &mut source)
        .unwrap();

    assert_eq!(fit.outcome, Outcome::Finished);
    // Five micro-batches in groups of two make three steps.
    assert_eq!((fit.state.epoch, fit.state.step), (8, 24));
    let history = read_history(run.path()).unwrap();
    assert_eq!(history, fit.state.history);
    assert_eq!(history.len(), 8);
    assert!(history[7].train_loss < 0.8 * history[0].train_loss);
    let lowest = history
        .iter()
        .map(|row| row.val_loss)
        .fold(f64::MAX, f64::min);
    assert_eq!(fit.state.best.unwrap().val_loss, lowest);

    let heard = heard.lock().unwrap();
    assert_eq!(heard.steps.len(), 24);
    assert_eq!(heard.epochs.len(), 8);
    assert!(heard.epochs[0].1, "the first epoch is the best so far");
    assert_eq!(heard.outcome, Some(Outcome::Finished));
    assert!(heard.steps.iter().all(|step| step.tokens_per_second > 0.0));

    let last = load_model(run.path(), CheckpointKind::Last, Tiny::new(4)).unwrap();
    assert_eq!(values(&last), values(&fit.model));
    let best = load_state(run.path(), CheckpointKind::Best).unwrap();
    assert_eq!(best.epoch, fit.state.best.unwrap().epoch);
}

#[test]
fn two_and_two_epochs_are_four() {
    let _alone = alone();
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let model = initial();
    let expected = fit(config(4), whole.path(), model.clone(), &mut Waves::new(5));
    fit(config(2), parts.path(), model, &mut Waves::new(5));
    let resumed = resume(config(4), parts.path(), &mut Waves::new(5));

    assert_eq!(values(&resumed.model), values(&expected.model));
    assert_eq!(
        losses(&resumed.state.history),
        losses(&expected.state.history)
    );
    let history = read_history(parts.path()).unwrap();
    assert_eq!(losses(&history), losses(&expected.state.history));
}

#[test]
fn dropout_masks_are_those_of_the_uninterrupted_run() {
    let _alone = alone();
    let run = |folder: &Path, cut: Option<usize>| {
        let model = initial().with_dropout(0.5);
        // The initial values are what they are; from here on only the run's seed may count.
        Device::default().seed(cut.map_or(1, |cut| cut as u64));
        let mut source = Waves::new(5);
        match cut {
            None => fit(config(2), folder, model, &mut source),
            Some(step) => {
                fit_until(config(2), folder, model, &mut source, step);
                let twin = Tiny::new(4).with_dropout(0.5);
                let mut trainer = Trainer::new(config(2), folder).unwrap();
                trainer.resume(twin, &mut Waves::new(5)).unwrap()
            }
        }
    };
    Device::default().seed(5);
    let whole = tempfile::tempdir().unwrap();
    let expected = values(&run(whole.path(), None).model);
    Device::default().seed(5);
    let parts = tempfile::tempdir().unwrap();
    assert_eq!(values(&run(parts.path(), Some(2)).model), expected);
    // Dropout is at work: without it the run ends elsewhere.
    Device::default().seed(5);
    let plain = tempfile::tempdir().unwrap();
    let plain = fit(config(2), plain.path(), initial(), &mut Waves::new(5));
    assert_ne!(values(&plain.model), expected);
}

#[test]
fn an_interrupted_epoch_goes_on_where_it_stopped() {
    let _alone = alone();
    // Step 2 is amid the first epoch, 3 its end, 5 amid the second.
    for step in [2, 3, 5] {
        let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let model = initial();
        let expected = fit(config(3), whole.path(), model.clone(), &mut Waves::new(5));
        let cut = fit_until(config(3), parts.path(), model, &mut Waves::new(5), step);
        assert_eq!(cut.outcome, Outcome::Interrupted);
        assert_eq!(cut.state.step, step);

        let mut source = Waves::new(5);
        let resumed = resume(config(3), parts.path(), &mut source);
        assert_eq!(
            values(&resumed.model),
            values(&expected.model),
            "step {step}"
        );
        assert_eq!(
            losses(&resumed.state.history),
            losses(&expected.state.history)
        );
        let first = (cut.state.epoch, cut.state.micro_batch);
        assert_eq!(source.seen[0], if step == 3 { (1, 0) } else { first });
    }
}

#[test]
fn a_time_limit_validates_saves_and_can_be_resumed_exactly() {
    let _alone = alone();
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let model = initial();
    let expected = fit(config(2), whole.path(), model.clone(), &mut Waves::new(5));
    // Passed at once, so each invocation takes the one step it is granted.
    let limited = TrainConfig {
        max_minutes: Some(1e-9),
        ..config(2)
    };
    let cut = fit(limited.clone(), parts.path(), model, &mut Waves::new(5));
    assert_eq!((cut.outcome, cut.state.step), (Outcome::TimeLimit, 1));
    let cut = resume(limited, parts.path(), &mut Waves::new(5));
    assert_eq!((cut.outcome, cut.state.step), (Outcome::TimeLimit, 2));

    let rows = read_history(parts.path()).unwrap();
    let row = &rows[0];
    assert_eq!((rows.len(), row.epoch, row.fraction), (1, 1, 0.8));
    let best = load_state(parts.path(), CheckpointKind::Best).unwrap();
    assert!(best.best.unwrap().val_loss <= row.val_loss);

    let resumed = resume(config(2), parts.path(), &mut Waves::new(5));
    assert_eq!(values(&resumed.model), values(&expected.model));
    let history = read_history(parts.path()).unwrap();
    assert_eq!(losses(&history), losses(&expected.state.history));
}

#[test]
fn a_run_that_stops_improving_is_stopped_and_its_rate_lowered() {
    let _alone = alone();
    let run = tempfile::tempdir().unwrap();
    let mut config = TrainConfig {
        early_stopping_patience: 4,
        // Nothing counts as an improvement after the first epoch.
        early_stopping_min_delta: 1e9,
        ..config(50)
    };
    config.plateau.threshold = 0.999_999;
    config.plateau.patience = 1;
    let first = fit(config.clone(), run.path(), initial(), &mut Waves::new(4));
    assert_eq!(
        (first.outcome, first.state.epoch),
        (Outcome::EarlyStopped, 5)
    );
    let rates: Vec<f64> = first.state.history.iter().map(|row| row.lr).collect();
    assert_eq!(rates, [0.01, 0.01, 0.01, 0.005, 0.005]);

    // Stopped is stopped, until the patience is raised.
    let again = resume(config.clone(), run.path(), &mut Waves::new(4));
    assert_eq!(
        (again.outcome, again.state.epoch),
        (Outcome::EarlyStopped, 5)
    );
    config.early_stopping_patience = 6;
    let more = resume(config, run.path(), &mut Waves::new(4));
    assert_eq!((more.outcome, more.state.epoch), (Outcome::EarlyStopped, 7));
}

#[test]
fn a_step_with_a_bad_gradient_is_skipped_and_many_are_an_error() {
    let _alone = alone();
    let run = tempfile::tempdir().unwrap();
    let heard = Arc::new(Mutex::new(Heard::default()));
    let listener = Listener {
        heard: heard.clone(),
        stop_at: None,
    };
    let mut source = Waves::new(6);
    source.poisoned = vec![(0, 1), (1, 2), (1, 5)];
    let fit = Trainer::new(config(2), run.path())
        .unwrap()
        .with_reporter(Box::new(listener))
        .fit(initial(), &mut source)
        .unwrap();
    assert_eq!(fit.state.step, 3);
    let skipped: Vec<usize> = fit
        .state
        .history
        .iter()
        .map(|row| row.skipped_steps)
        .collect();
    assert_eq!(skipped, [1, 2]);
    assert!(values(&fit.model).iter().all(|value| value.is_finite()));
    assert!(
        fit.state
            .history
            .iter()
            .all(|row| row.train_loss.is_finite())
    );
    assert!(heard.lock().unwrap().messages[0].contains("gradient norm is NaN"));

    let run = tempfile::tempdir().unwrap();
    let mut source = Waves::new(10);
    source.poisoned = (2..10).map(|index| (0, index)).collect();
    let strict = TrainConfig {
        max_skipped_steps: 3,
        ..config(1)
    };
    let error = Trainer::new(strict, run.path())
        .unwrap()
        .fit(initial(), &mut source)
        .unwrap_err();
    let expected = "3 steps in a row (last: epoch 1, step 1)";
    assert!(error.to_string().contains(expected), "{error}");
}

#[test]
fn validation_reads_no_more_batches_than_allowed() {
    let _alone = alone();
    for (max_val_batches, read) in [(0, 3), (1, 1), (2, 2), (5, 3)] {
        let run = tempfile::tempdir().unwrap();
        let config = TrainConfig {
            max_val_batches,
            ..config(1)
        };
        let mut source = Waves::new(2);
        fit(config, run.path(), initial(), &mut source);
        assert_eq!(source.validated, read, "at most {max_val_batches}");
    }
}

#[test]
fn the_validation_loss_is_the_mean_over_positions() {
    let _alone = alone();
    let run = tempfile::tempdir().unwrap();
    let mut source = Waves::new(2);
    let fit = fit(config(1), run.path(), initial(), &mut source);
    let loss = config(1).loss;
    let model = fit.model.valid();
    // All batches have the same number of valid positions, so this is the mean of their losses.
    let losses = source.validation().unwrap().map(|batch| {
        let batch = batch.unwrap();
        let prediction = model.forward(batch.input);
        let loss = masked_huber(prediction, batch.target, batch.mask, &loss);
        f64::from(loss.into_scalar::<f32>())
    });
    let mean = losses.sum::<f64>() / 3.0;
    assert!((fit.state.history[0].val_loss - mean).abs() < 1e-6);
}

#[test]
fn periodic_checkpoints_are_written_within_an_epoch() {
    let _alone = alone();
    let run = tempfile::tempdir().unwrap();
    let config = TrainConfig {
        checkpoint_every: 2,
        ..config(1)
    };
    let mut source = Waves::new(8);
    source.unreadable = Some((0, 6));
    let error = Trainer::new(config, run.path())
        .unwrap()
        .fit(initial(), &mut source)
        .unwrap_err();
    let message = "reading a training batch failed: the shard is cut short";
    assert_eq!(error.to_string(), message);
    let state = load_state(run.path(), CheckpointKind::Last).unwrap();
    assert_eq!((state.step, state.micro_batch), (2, 4));
}

#[test]
fn runs_that_cannot_start_say_why() {
    let _alone = alone();
    let error = |fit: Result<Fit<Tiny>, TrainError>| fit.unwrap_err().to_string();
    let run = tempfile::tempdir().unwrap();
    let mut trainer = Trainer::new(config(1), run.path()).unwrap();
    let missing = error(trainer.resume(Tiny::new(4), &mut Waves::new(4)));
    assert!(missing.contains("there is no checkpoint at"), "{missing}");

    let empty = error(trainer.fit(Tiny::new(4), &mut Waves::new(0)));
    assert!(empty.contains("no training batches"), "{empty}");
    let mut source = Waves::new(4);
    source.val_batches = 0;
    let empty = error(trainer.fit(Tiny::new(4), &mut source));
    assert!(empty.contains("no validation batches"), "{empty}");

    let run = tempfile::tempdir().unwrap();
    let mut trainer = Trainer::new(config(1), run.path()).unwrap();
    trainer.fit(Tiny::new(4), &mut Waves::new(4)).unwrap();
    let exists = error(trainer.fit(Tiny::new(4), &mut Waves::new(4)));
    assert!(exists.contains("already holds a training run"), "{exists}");
    let other = error(trainer.resume(Tiny::new(5), &mut Waves::new(4)));
    let message = "`first.weight`: expected [2, 5], found [2, 4]";
    assert!(other.contains(message), "{other}");

    let mut weighted = config(1);
    weighted.loss.feature_weights = vec![1.0; 5];
    let run = tempfile::tempdir().unwrap();
    let mut trainer = Trainer::new(weighted, run.path()).unwrap();
    let weights = error(trainer.fit(Tiny::new(4), &mut Waves::new(4)));
    assert!(
        weights.contains("`loss.feature_weights` has shape [5], expected [2]"),
        "{weights}"
    );
}

#[test]
fn an_epoch_is_not_continued_with_other_batches() {
    let _alone = alone();
    let run = tempfile::tempdir().unwrap();
    fit_until(config(2), run.path(), initial(), &mut Waves::new(5), 1);
    for (seed, accumulation, batches, field) in [
        (
            7,
            2,
            5,
            "`seed` was 42 when the checkpoint was written and is 7 now",
        ),
        (42, 4, 5, "`accumulation` was 2"),
        (42, 2, 6, "`batches per epoch` was 5"),
    ] {
        let config = TrainConfig {
            seed,
            accumulation,
            ..config(2)
        };
        let mut trainer = Trainer::new(config, run.path()).unwrap();
        let error = trainer
            .resume(Tiny::new(4), &mut Waves::new(batches))
            .unwrap_err();
        assert!(error.to_string().contains(field), "{error}");
    }
}

#[test]
fn mixed_precision_keeps_parameters_in_f32_and_follows_the_f32_run() {
    let _alone = alone();
    let model = initial().with_mixed_precision();
    let mixed = TrainConfig {
        precision: Precision::Bf16,
        ..config(4)
    };
    let (wide, narrow) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let wide = fit(config(4), wide.path(), model.clone(), &mut Waves::new(5));
    let narrow = fit(mixed, narrow.path(), model.clone(), &mut Waves::new(5));

    let (start, wide, narrow) = (values(&model), values(&wide.model), values(&narrow.model));
    let distance = |a: &[f32], b: &[f32]| {
        let squares = a.iter().zip(b).map(|(a, b)| (a - b).powi(2));
        squares.sum::<f32>().sqrt()
    };
    let difference = distance(&wide, &narrow);
    assert!(difference > 0.0, "nothing was computed in bf16");
    assert!(difference < 0.1 * distance(&start, &wide), "{difference}");
    // bf16 has zeros in its lower 16 bits.
    assert!(narrow.iter().any(|value| value.to_bits() & 0xffff != 0));
}

#[test]
fn a_model_without_mixed_precision_says_so() {
    let _alone = alone();
    let run = tempfile::tempdir().unwrap();
    let mixed = TrainConfig {
        precision: Precision::Bf16,
        ..config(1)
    };
    let mut trainer = Trainer::new(mixed, run.path()).unwrap();
    let error = trainer.fit(Tiny::new(4), &mut Waves::new(4)).unwrap_err();
    let message = "`precision` is Bf16, which this model does not support; use `f32`";
    assert!(error.to_string().contains(message), "{error}");
}
