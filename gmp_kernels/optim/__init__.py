"""Optimizers whose cost and memory fall as the model gets sparser; drop-in for ``torch.optim``."""

from gmp_kernels.optim.adam import Adam, AdamW
from gmp_kernels.optim.gradients import clip_grad_norm_, ema_update_
from gmp_kernels.optim.sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "clip_grad_norm_", "ema_update_"]
