"""Optimizers whose cost and memory fall as the model gets sparser; drop-in for ``torch.optim``."""

from gmp_kernels.optim import optimizers
from gmp_kernels.optim.gradients import clip_grad_norm_, ema_update_
from gmp_kernels.optim.optimizers import *  # noqa: F403  an optimizer is added there alone

__all__ = ["clip_grad_norm_", "ema_update_"]
__all__ += optimizers.__all__
