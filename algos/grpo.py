"""Group-relative policy optimisation."""

from __future__ import annotations

from typing import Any

from leyden.advantages import Estimator, GroupRelative
from leyden.errors import UserError
from leyden.on_policy import PolicyGradient


class GRPO(PolicyGradient):
    """Learn from rewards without a value function: the advantage of a response is its reward less the mean of its
    prompt's responses (Shao et al. 2024, section 4.1).

    `--config grpo` sets what the paper has: advantages divided by the standard deviation within a prompt (`scale`), a
    mean over responses of the mean over their tokens (`average`), and the KL as a k3 term of the loss (`kl`). The
    first two bias the gradient (Liu et al. 2025), and that of k3 is of another divergence, so that the defaults here
    are without them. Dr. GRPO, DAPO, GSPO and CISPO are settings of the same class; see their configs.

    Args:
        scale: divide advantages by the standard deviation within a prompt, as published; None is no. It is a setting of
            the estimator that is taken where none is given.
        samples: responses to each prompt, 2 or more.
        estimator: advantages from rewards; None compares with the mean of the prompt's responses.
    """

    def __init__(
        self,
        *args: Any,
        samples: int = 8,
        scale: bool | None = None,
        estimator: Estimator | None = None,
        **kwargs: Any,
    ) -> None:
        if estimator is not None and scale is not None:
            raise UserError(
                f"--model.scale: of the default estimator, and --model.estimator is given, {type(estimator).__name__}; "
                f"set --model.estimator.scale {str(scale).lower()} where it has that, or leave --model.scale out"
            )
        super().__init__(*args, samples=samples, estimator=estimator or GroupRelative(bool(scale)), **kwargs)
