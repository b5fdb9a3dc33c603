"""The contract of rewards, functions of sampled responses, and `score`, which calls one and checks what it returns."""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from leyden.errors import UserError
from leyden.example import Sample
from leyden.policy.policy import Policy

NO_TERMS: Mapping[str, Tensor] = MappingProxyType({})


class Reward(ABC):
    """Scores samples. Called with N samples, it returns N finite numbers, higher for better: a float32 tensor [N]; or
    these and what they are made of, `(scores, {NAME: N numbers})`.

    Derive a class from this one, or write any class with such a `__call__`, or a plain function: all count as rewards.
    A reward that is a module (`torch.nn.Module`) is moved to the device, never trained, and never in a checkpoint.
    """

    terms: Mapping[str, Tensor] = NO_TERMS
    """The components of the last call's scores, by name, [N] each: logged beside the reward itself."""

    @abstractmethod
    def __call__(self, samples: Sequence[Sample]) -> Tensor | tuple[Tensor, Mapping[str, Tensor]]: ...

    def attach(self, policy: Policy) -> None:  # noqa: B027 — most rewards do not care
        """Take the policy whose responses will be scored. Called once it is built, before it is trained."""

    @classmethod
    def __subclasshook__(cls, other: type) -> Any:
        """Whatever can be called is a reward, except metaclasses: `type` has a `__call__`, but a class is no reward."""
        if cls is not Reward or issubclass(other, type):
            return NotImplemented
        return True if any("__call__" in base.__dict__ for base in other.__mro__) else NotImplemented


def name_of(reward: Any) -> str:
    """The name of a reward in messages and metrics: its `name`, or that of its function or class.

    Args:
        reward: an object or a function.
    """
    name = getattr(reward, "name", None)
    return name if isinstance(name, str) else str(getattr(reward, "__name__", type(reward).__name__))


def attach(reward: Any, policy: Policy) -> None:
    """Hand a reward the policy, if it has a method `attach`."""
    if (method := getattr(reward, "attach", None)) is not None:
        method(policy)


def score(reward: Callable[[Sequence[Sample]], Any], samples: Sequence[Sample]) -> Tensor:
    """Call a reward for the scores of N samples and check them: [N] float32 on the CPU.

    Args:
        reward: an object or a function, called with the samples.
        samples: N of them; without any the reward is not called.

    Raises:
        UserError: it raised an error, or gave something else than N finite numbers.
    """
    return score_with_terms(reward, samples)[0]


def score_with_terms(
    reward: Callable[[Sequence[Sample]], Any], samples: Sequence[Sample]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Call a reward for the scores of N samples and what they are made of, and check both: [N] float32 on the CPU.

    The terms are those that it returns beside the scores, or has as `terms` afterwards. Sequences of numbers and arrays
    are taken like tensors.

    Raises:
        UserError: it raised an error, or gave something else than N finite numbers; the message names the reward, the
            row where one is to blame, and what to do.
    """
    if not samples:
        return torch.zeros(0), {}
    try:
        returned = _call(reward, samples)
    except UserError:
        raise
    except Exception as error:
        raise _failure(reward, samples, error) from error
    name, terms = name_of(reward), getattr(reward, "terms", NO_TERMS)
    if isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], Mapping):
        returned, terms = returned
    given = terms.items() if isinstance(terms, Mapping) else ()  # `terms` of a user's class may be anything
    parts = {str(part): _finite(f"{name}: its term {part}", values, samples) for part, values in given}
    return _finite(name, returned, samples), parts


def _finite(name: str, returned: Any, samples: Sequence[Sample]) -> Tensor:
    """What a reward returned as [N] finite float32."""
    numbers = _numbers(name, returned, samples)
    for place in (~torch.isfinite(numbers)).nonzero()[:1, 0].tolist():
        raise UserError(f"{at(samples[place])}: {name} gave {numbers[place]:g}; give every response a number")
    return numbers


def _call(reward: Callable[[Sequence[Sample]], Any], samples: Sequence[Sample]) -> Any:
    """The value that a reward returns; a generator is read to its end, since it does its work only then."""
    returned = reward(samples)
    return list(returned) if isinstance(returned, Iterator) else returned


def at(sample: Sample) -> str:
    """`file:line (response '…')` of a sample, for messages."""
    text = " ".join(sample.response.split())
    text = text if len(text) <= 60 else text[:59] + "…"
    return f"{sample.source or 'a row'} (response {text!r})"


def _numbers(name: str, returned: Any, samples: Sequence[Sample]) -> Tensor:
    """The value that a reward returned as [N] float32."""
    n = len(samples)
    if isinstance(returned, Iterable) and not isinstance(returned, Tensor | str | bytes | Mapping | Set):
        returned = returned if hasattr(returned, "__array__") else _floats(name, list(returned), samples)
    try:
        scores = torch.as_tensor(returned).detach()
    except (TypeError, ValueError, RuntimeError):
        scores = torch.zeros(())  # no tensor of numbers
    if scores.shape != (n,):
        got = f"shape {list(scores.shape)}" if scores.ndim else type(returned).__name__
        named = ", or (scores, {NAME: numbers})" if isinstance(returned, Mapping) else ""
        raise UserError(f"{name} gave {got} for {n} samples; return one number for each, in their order{named}")
    if scores.is_complex():
        raise UserError(f"{name} gave complex numbers; return real ones")
    return scores.to("cpu", torch.float32)


def _floats(name: str, values: list[Any], samples: Sequence[Sample]) -> list[float]:
    """A list of values as floats, one for each sample."""
    if len(values) != len(samples):
        raise UserError(
            f"{name} gave {len(values)} scores for {len(samples)} samples; return one number for each, in their order"
        )
    numbers = []
    for value, sample in zip(values, samples, strict=True):
        try:
            if isinstance(value, str):
                raise TypeError
            numbers.append(float(value))
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise UserError(f"{at(sample)}: {name} gave {value!r:.40}, not a number; give it a number") from None
    return numbers


def _failure(reward: Any, samples: Sequence[Sample], error: Exception) -> UserError:
    """The error of a reward as one line: what went wrong, in which line of its code, and at which row."""
    guilty = next((sample for sample in samples if _raises(reward, sample)), None) if len(samples) > 1 else samples[0]
    first, last = samples[0].source, samples[-1].source
    row = at(guilty) if guilty is not None else f"{len(samples)} samples from {first or 'a row'} to {last or 'another'}"
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    local = [frame for frame in lines if Path.cwd() in Path(frame.filename).parents]
    own = [frame for frame in local if "site-packages" not in frame.filename] or lines
    place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    message = (str(error).strip().splitlines() or [""])[0]
    problem = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return UserError(f"{row}: {name_of(reward)} failed with {problem}{place}; mend the reward or the row")


def _raises(reward: Any, sample: Sample) -> bool:
    """Whether a sample makes a reward fail by itself."""
    try:
        _call(reward, [sample])
    except Exception:
        return True
    return False
