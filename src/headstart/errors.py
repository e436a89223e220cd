"""Every error that headstart raises on purpose. Each says what, where, and what to do next.

HeadstartError
├── ConfigError (ValueError)
│   ├── BadRank            a rank that is no positive integer, or does not fit a weight
│   ├── BadAlpha           a scale that a start cannot be built with
│   ├── BadOption          a value, an option or a combination that has no meaning
│   ├── UnknownInit        no strategy of that name
│   └── UnknownField       no such field in a config
├── TargetError (ValueError)
│   ├── NoTarget           a pattern that matches nothing
│   ├── UnsupportedLayer   a layer kind that this strategy or feature cannot serve
│   ├── AdapterState       already adapted, not adapted, merged: the wrong moment
│   └── BadRoute           rows that go to an adapter that is not there, or that a batch does not have
├── WeightError (ValueError)
│   ├── NonFiniteWeight    NaN or infinity in a weight
│   ├── MetaWeight         the values are needed and are not there
│   └── SVDError           no route reached the certificate asked for
├── StatisticsError (ValueError)
│   ├── MissingStatistic   a strategy needs data and was given none
│   ├── TooLittleData      fewer tokens than a start needs directions
│   ├── NoSignal           a layer that never ran, or whose gradient is zero
│   └── CalibrationError   data, a model or a loss that a pass cannot be made with
├── FileError (ValueError)
│   ├── AdapterFormatError a file that is no adapter, or a malformed one
│   ├── KeyMismatch        tensors missing, left over, or of another shape
│   ├── WrongBase          an adapter of another base model
│   ├── NotPortable        an adapter that a file format cannot hold
│   ├── Unstreamable       a checkpoint that only its own library can put together
│   └── OutputBusy         somebody else is writing there
└── DataError (ValueError) training data that cannot be read or used
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HeadstartError(Exception):
    """The root: catch this to catch all of them."""


class ConfigError(HeadstartError, ValueError):
    """A configuration that cannot be meant."""


class BadRank(ConfigError):
    """A rank that is no positive integer, or that does not fit a weight."""


class BadAlpha(ConfigError):
    """A scale (alpha) that a start cannot be built with."""


class BadOption(ConfigError):
    """A value, an option or a combination of options that has no meaning."""


class UnknownInit(ConfigError):
    """No strategy goes by this name."""


class UnknownField(ConfigError):
    """A config has no field of this name."""


class TargetError(HeadstartError, ValueError):
    """What to adapt, in this model, cannot be adapted like this."""


class NoTarget(TargetError):
    """A target, an exclusion or a pattern matches no module."""


class UnsupportedLayer(TargetError):
    """A layer kind that this strategy or feature cannot serve."""


class AdapterState(TargetError):
    """The wrong moment: already adapted, not adapted, or merged."""


class BadRoute(TargetError):
    """Rows that are routed to an adapter that is not there, or that the batch does not have."""


class WeightError(HeadstartError, ValueError):
    """A weight that cannot be used."""


class NonFiniteWeight(WeightError):
    """A weight holds NaN or infinity."""


class MetaWeight(WeightError):
    """The start needs the values of a weight, and they are not loaded."""


class SVDError(WeightError):
    """No route reached the certificate that was asked for."""


class StatisticsError(HeadstartError, ValueError):
    """Statistics of the user's data that are missing or unusable."""


class MissingStatistic(StatisticsError):
    """A strategy needs calibration data and was given none."""


class TooLittleData(StatisticsError):
    """The data holds fewer tokens than the start needs directions."""


class NoSignal(StatisticsError):
    """The data says nothing about a layer: it never ran, or its gradient is zero."""


class CalibrationError(StatisticsError):
    """The pass over the data cannot be made: no batch, no loss, a NaN, not enough memory."""


class FileError(HeadstartError, ValueError):
    """A file that cannot be read or written as asked."""


class AdapterFormatError(FileError):
    """A file that is no adapter, or a malformed one."""


class KeyMismatch(FileError):
    """Tensors that are missing, left over, or of another shape."""


class WrongBase(FileError):
    """An adapter that was made for another base model."""


class NotPortable(FileError):
    """An adapter, or a part of one, that the file asked for has no place for."""


class Unstreamable(FileError):
    """A checkpoint whose tensors do not lie on disk as its model holds them: only its own library puts it together."""


class OutputBusy(FileError):
    """Somebody else is writing to this place."""


class DataError(HeadstartError, ValueError):
    """Training data that cannot be read or used."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The tail of a message: `; did you mean 'pissa'?`, or nothing where nothing is near."""
    close = difflib.get_close_matches(name, list(known), n=count, cutoff=0.6)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
