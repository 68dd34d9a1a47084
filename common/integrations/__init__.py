"""AugSub in other people's trainers; docs/integrations.md has the complete program for each.

`timm_task` and `timm_train` are for timm's tasks and its train.py, `transformers` for transformers' Trainer. Each
imports its own library, so this package needs none of them. Lightning, accelerate and a loop of your own call AugSub
itself.
"""
