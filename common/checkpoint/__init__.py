"""Checkpoints: one file per state, written atomically and in the background, read without running code.

A file of this trainer is in torch's format and holds tensors and plain values only:

    model, model_ema      state dicts under timm's names: `timm.create_model(name, checkpoint_path=…)` takes the file
    mask_tokens           AugSub's mask token of each of them, which timm's models do not have
    optimizer, scaler     their state dicts
    epoch                 the last one that is complete, counted from 0; -1 before the first
    best                  {"acc1": %, "epoch": its epoch}; empty before the first
    args, processes       the flags' values, the number of ranks
    class_names           in the order of the labels, or None; absent, as preprocessing, in files of earlier versions
    preprocessing         of the images: size, mean, std, interpolation, crop
    updates               optimizer steps per epoch
    log                   the lines of log.txt
    position, own         in the middle of an epoch: `EpochProgress`, and each rank's `rank_state`; else None
    digest                SHA-256 of all of this

io.py writes and reads one file, untrusted.py checks files of unknown origin, arrays.py holds what NumPy pickled,
sources.py finds the file that a flag names, weights.py fits weights to a model, report.py says what was taken,
state.py collects a run's state, manager.py keeps the newest, previous and best ones, resume.py picks and restores one,
class_names.py compares the classes of a file with the data's. hub_format.py writes the model alone, for timm.
"""
