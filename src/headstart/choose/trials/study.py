"""The jobs of a comparison in an Optuna study: who does what, what came out, and what a dead worker left.

One trial of the study is one job, told from the others by its key. Nothing is queued: what is due follows from what
is done, so every worker finds it out for itself.

    claim    add a RUNNING trial; of several with one key the one with the lowest number has it (the database numbers
             trials one after the other), and the others step back
    finish   COMPLETE with its loss, or PRUNED where it diverged; what came out is in the trial's attributes
    crash    FAIL with the error: the job is done, and counts as diverged
    die      a RUNNING trial whose process is gone, or has not been heard of for minutes, becomes FAIL without an
             error: its job is due again, and nothing of it was counted
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headstart.errors import BadOption, FileError
from headstart.files.atomic import alive

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

BEAT = 30.0  # seconds between signs of life
SILENCE = 300.0  # seconds after which a worker on another machine counts as dead

Outcome = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A job that this worker has."""

    key: str
    number: int
    trial_id: int


class Study:
    """A comparison's study, shared by all that work on it.

    Args:
        storage: a database URL as Optuna takes it; None for this process alone.
        name: of the study; whoever uses the same one works on the same comparison.

    Raises:
        BadOption: if optuna is missing, or the URL is none. FileError: if the database cannot be reached.
    """

    def __init__(self, storage: str | None, name: str) -> None:
        optuna = _optuna()
        self.name = name
        loudness = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            self._storage = _opened(optuna, storage)
            self._study = optuna.create_study(storage=self._storage, study_name=name, load_if_exists=True)
            self._id = self._storage.get_study_id_from_name(name)
        except Exception as error:  # Each database and each driver has its own.
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise FileError(f"cannot use the storage {storage!r}: {reason}; check the URL and its driver") from error
        finally:
            optuna.logging.set_verbosity(loudness)

    def outcomes(self) -> dict[str, Outcome]:
        """What is done, by key."""
        found: dict[str, Outcome] = {}
        for trial in self._trials():
            if _is_done(trial):
                found.setdefault(trial.user_attrs["key"], trial.user_attrs["outcome"])
        return found

    def running(self) -> set[str]:
        """The keys of jobs that somebody has, after what the dead have left is given back."""
        self._bury()
        return {trial.user_attrs["key"] for trial in self._trials() if trial.state.name == "RUNNING"}

    def claim(self, key: str, shown: Mapping[str, Any]) -> Claim | None:
        """Take a job; None where somebody else has it or has done it.

        Args:
            shown: what a dashboard shows of it: the arm, the rate.
        """
        from optuna.distributions import FloatDistribution
        from optuna.trial import TrialState, create_trial

        params = {"rate": shown["rate"]} if "rate" in shown else {}
        kinds: dict[str, Any] = {name: FloatDistribution(1e-30, 1e30, log=True) for name in params}
        token, here = uuid.uuid4().hex, {"host": socket.gethostname(), "process": os.getpid(), "beat": time.time()}
        attributes = {"key": key, "token": token, **shown, **here}
        self._study.add_trial(
            create_trial(state=TrialState.RUNNING, params=params, distributions=kinds, user_attrs=attributes)
        )
        same = [t for t in self._trials() if t.user_attrs["key"] == key]
        own = next(t.number for t in same if t.user_attrs["token"] == token)
        if any(t.number < own and (t.state.name == "RUNNING" or _is_done(t)) for t in same):
            self._study.tell(own, state=TrialState.FAIL)
            return None
        return Claim(key, own, self._storage.get_trial_id_from_study_id_trial_number(self._id, own))

    @contextmanager
    def alive(self, claim: Claim) -> Iterator[None]:
        """Within, the others see that this worker lives; if it is interrupted, its job is due again."""
        from optuna.trial import TrialState

        stop = threading.Event()

        def beat() -> None:
            while not stop.wait(BEAT):
                self._storage.set_trial_user_attr(claim.trial_id, "beat", time.time())

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            self._study.tell(claim.number, state=TrialState.FAIL)
            raise
        finally:
            stop.set()
            thread.join()

    def finish(self, claim: Claim, outcome: Outcome) -> None:
        """Write what came out. Its `value` is the loss; without one the job diverged, or crashed with an `error`."""
        from optuna.trial import TrialState

        self._storage.set_trial_user_attr(claim.trial_id, "outcome", outcome)
        value = outcome.get("value")
        if outcome.get("error"):
            self._study.tell(claim.number, state=TrialState.FAIL)
        elif value is None or not math.isfinite(value):
            self._study.tell(claim.number, state=TrialState.PRUNED)
        else:
            self._study.tell(claim.number, value)

    def _trials(self) -> list[FrozenTrial]:
        """All jobs, in the order of their numbers."""
        return sorted((t for t in self._study.get_trials(deepcopy=False) if "key" in t.user_attrs), key=_number)

    def _bury(self) -> None:
        """Give back the jobs of workers that are dead."""
        from optuna.trial import TrialState

        for trial in self._trials():
            if trial.state.name == "RUNNING" and _is_dead(trial.user_attrs):
                self._study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise BadOption("to compare, install optuna and scipy: pip install 'headstart[compare]'") from error
    return optuna


def _opened(optuna: Any, storage: str | None) -> Any:
    """The storage; its tables are made where there are none, which two workers may begin at once."""
    for _ in range(4):
        try:
            return optuna.storages.get_storage(storage)
        except Exception as error:
            if "already exists" not in str(error) and "UNIQUE" not in str(error).upper():
                raise
            time.sleep(0.5)
    return optuna.storages.get_storage(storage)


def _number(trial: FrozenTrial) -> int:
    return trial.number


def _is_done(trial: FrozenTrial) -> bool:
    """A crash is done too. What died has no outcome, or died while it wrote one."""
    outcome = trial.user_attrs.get("outcome")
    failed = trial.state.name == "FAIL"
    return outcome is not None and trial.state.is_finished() and (not failed or bool(outcome.get("error")))


def _is_dead(attributes: Mapping[str, Any]) -> bool:
    if attributes["host"] == socket.gethostname():
        return attributes["process"] != os.getpid() and not alive(attributes["process"])
    return time.time() - float(attributes["beat"]) > SILENCE
