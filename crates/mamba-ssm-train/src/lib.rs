//! Training loop for Burn forecasters: masked Huber loss, plateau schedule, clipping, accumulation, checkpoints.
