"""Everything that can go wrong, as one tree.

The class says whose fault it is and how each protocol reports it; the message says which thing, what was got and what
was wanted. Whatever is not in this tree is our own mistake: it is logged with an id, and the robot sees only the id.
"""

from collections.abc import Iterable
from typing import ClassVar


class PolicyServerError(Exception):
    """Base of the tree.

    Attributes:
        code: Stable name for programs, such as "shape_mismatch".
        status: HTTP status.
    """

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500


class ClientError(PolicyServerError):
    """The request was wrong; sending it again will not help."""

    code = "bad_request"
    status = 400


class MalformedMessage(ClientError):
    """The bytes are not a message."""

    code = "malformed_message"


class MessageTooBig(ClientError):
    """The message is larger than the server takes."""

    code = "message_too_big"
    status = 413

    def __init__(self, got_bytes: int | None, limit_bytes: int) -> None:
        got = "more" if got_bytes is None else f"{got_bytes} bytes"
        super().__init__(f"a message holds at most {limit_bytes} bytes, got {got}")


class Unauthorized(ClientError):
    """No API key, or a wrong one."""

    code = "unauthorized"
    status = 401

    def __init__(self) -> None:
        super().__init__(
            "a valid API key is needed: send 'Authorization: Api-Key <key>' or 'Authorization: Bearer <key>'"
        )


class Forbidden(ClientError):
    """A key is good for asking, but not for changing what is served."""

    code = "forbidden"
    status = 403


class SwapUnderWay(ClientError):
    """A policy is being swapped already."""

    code = "swap_under_way"
    status = 409

    def __init__(self, name: str) -> None:
        super().__init__(f"policy {name!r} is being swapped already; wait for that to end")


class UnknownPolicy(ClientError):
    """No policy of that name is loaded."""

    code = "unknown_policy"
    status = 404

    def __init__(self, name: str, loaded: Iterable[str]) -> None:
        super().__init__(f"no policy {name!r} is loaded; there are: {', '.join(loaded)}")


class ObservationError(ClientError):
    """An observation does not fit the policy's spec."""

    code = "bad_observation"
    status = 422


class UnusableGoal(ObservationError):
    """A goal is of the right kind, but the policy can make nothing of it."""

    code = "unusable_goal"


class MissingInput(ObservationError):
    """The spec needs an input that did not come."""

    code = "missing_input"

    def __init__(self, name: str, got: Iterable[str]) -> None:
        super().__init__(f"{name!r} is missing; got {', '.join(sorted(map(repr, got))) or 'nothing'}")


class UnexpectedInput(ObservationError):
    """An input came that the policy does not have: likely a misspelt one."""

    code = "unexpected_input"

    def __init__(self, name: str, wanted: Iterable[str]) -> None:
        super().__init__(f"{name!r} is not an input of this policy; it takes {', '.join(map(repr, wanted))}")


class ShapeMismatch(ObservationError):
    """An array has the wrong shape."""

    code = "shape_mismatch"

    def __init__(self, name: str, got: tuple[int, ...] | str, wanted: str) -> None:
        super().__init__(f"{name!r} has shape {got}, expected {wanted}")


class WrongType(ObservationError):
    """A value has the wrong type or dtype."""

    code = "wrong_type"

    def __init__(self, name: str, got: str, wanted: str) -> None:
        super().__init__(f"{name!r} is {got}, expected {wanted}")


class NotFinite(ObservationError):
    """A number is NaN or infinite."""

    code = "not_finite"

    def __init__(self, name: str, index: int, got: float) -> None:
        super().__init__(f"{name!r} holds {got} at index {index}, expected finite float32 numbers")


class UndecodableImage(ObservationError):
    """An encoded image is neither JPEG nor PNG, or is broken, or is too large."""

    code = "undecodable_image"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name!r} is not a usable image: {reason}")


class InvalidOption(ClientError):
    """A sampling option is out of range."""

    code = "invalid_option"
    status = 422


class UnsupportedProtocol(ClientError):
    """The robot speaks another version of the streaming protocol."""

    code = "unsupported_protocol"

    def __init__(self, got: int, wanted: int) -> None:
        super().__init__(f"this server speaks version {wanted} of the streaming protocol, got {got}")


class UnknownRevision(ClientError):
    """An observation relies on a `set` that did not arrive."""

    code = "unknown_revision"
    status = 409

    def __init__(self, got: int, known: int) -> None:
        super().__init__(f"the observation relies on revision {got}, known is {known}; send that 'set' again")


class Unavailable(PolicyServerError):
    """Nothing is wrong with the request, but it cannot be served now."""

    code = "unavailable"
    status = 503


class Overloaded(Unavailable):
    """The queue is full."""

    code = "overloaded"

    def __init__(self, waiting: int) -> None:
        super().__init__(f"{waiting} requests already wait for this policy; try again in a moment")


class TooManySessions(Unavailable):
    """There is no room for another robot."""

    code = "too_many_sessions"

    def __init__(self, capacity: int) -> None:
        super().__init__(f"{capacity} robots have a session already; try again when one has left")


class RateTooHigh(Unavailable):
    """A robot declared a rate that the server cannot hold beside those that it has promised."""

    code = "rate_too_high"

    def __init__(self, wanted_hz: float, left_hz: float) -> None:
        super().__init__(
            f"{wanted_hz:g} chunks a second cannot be held, {left_hz:g} are left; declare less, or nothing and take "
            "what comes"
        )


class Draining(Unavailable):
    """The server is shutting down."""

    code = "draining"

    def __init__(self) -> None:
        super().__init__("the server is shutting down and takes no new requests")


class DeadlineExceeded(Unavailable):
    """The answer would have come too late."""

    code = "deadline_exceeded"
    status = 504

    def __init__(self, late_ms: float, *, needs_ms: float = 0.0) -> None:
        if late_ms < 0:
            text = f"{-late_ms:.1f} ms are left until the deadline, and the chunk needs {needs_ms:.1f} ms"
        else:
            text = f"the deadline passed {late_ms:.1f} ms ago, before the chunk was ready"
        super().__init__(text)


class Abandoned(Unavailable):
    """Whoever asked no longer waits."""

    code = "abandoned"

    def __init__(self) -> None:
        super().__init__("nobody waits for this chunk any more")


class EngineUnreachable(Unavailable):
    """The server that runs the policy does not answer."""

    code = "engine_unreachable"

    def __init__(self, policy: str, reason: str) -> None:
        super().__init__(f"policy {policy!r} runs on a server that cannot answer now: {reason}; try again in a moment")


class EngineFailed(PolicyServerError):
    """The server that runs the policy failed to answer this request."""

    code = "engine_failed"
    status = 502


class NonFiniteActions(PolicyServerError):
    """The policy itself produced NaN or infinity; the robot gets no chunk rather than a bad one."""

    code = "non_finite_actions"

    def __init__(self, policy: str) -> None:
        super().__init__(f"policy {policy!r} produced actions that are not finite; they were withheld")


class LimitsViolated(PolicyServerError):
    """The policy's actions are outside of their limits, and such chunks are not to be sent."""

    code = "limits_violated"

    def __init__(self, policy: str, what: str, got: str, wanted: str) -> None:
        super().__init__(f"policy {policy!r} produced {what} of {got}, allowed is {wanted}; the chunk was withheld")


class StartupError(PolicyServerError):
    """The server cannot start like this, or cannot serve what it was told to."""

    code = "startup"
    status = 422


class BundleError(StartupError):
    """A bundle cannot be served."""

    code = "bundle"


class BundleInvalid(BundleError):
    """A bundle's files do not say what they must."""

    code = "bundle_invalid"


class BundleCorrupt(BundleError):
    """A file is not the one that the bundle was published with."""

    code = "bundle_corrupt"

    def __init__(self, path: str, got: str, wanted: str) -> None:
        super().__init__(f"{path} has SHA-256 {got[:16]}..., the bundle was published with {wanted[:16]}...")


class GoldenDrift(BundleError):
    """An engine does not reproduce the bundle's golden case."""

    code = "golden_drift"

    def __init__(self, policy: str, engine: str, drift: float, tolerance: float) -> None:
        self.drift = drift
        super().__init__(
            f"engine {engine!r} misses the golden case of policy {policy!r} by {drift:.2e} of the action range, "
            f"tolerated is {tolerance:.2e}"
        )


class NotInterchangeable(BundleError):
    """A new version of a policy would not fit the robots that are connected to the old one."""

    code = "not_interchangeable"

    def __init__(self, policy: str, what: str, got: object, wanted: object) -> None:
        super().__init__(
            f"the new bundle of {policy!r} has another {what}: {got}, served is {wanted}. Robots that are connected "
            "would fail; serve it under another name"
        )


class UnsupportedGraph(BundleError):
    """A compiler cannot build a bundle's graph; says which operator of which graph, and what it would take."""

    code = "unsupported_graph"


class EngineUnavailable(StartupError):
    """An engine was asked for that this installation cannot run."""

    code = "engine_unavailable"


class EngineNotInstalled(EngineUnavailable):
    """An engine's library is missing, or was built without what the engine needs."""

    code = "engine_not_installed"


class DeviceNotFound(EngineUnavailable):
    """An engine's library is there, but not the device that it computes on."""

    code = "device_not_found"


def revive(code: str, message: str) -> PolicyServerError | None:
    """Return the error that another of our processes reported as `code: message`; None if it is not of this tree."""
    kinds: list[type[PolicyServerError]] = [PolicyServerError]
    for kind in kinds:
        if kind.code == code and kind is not PolicyServerError:
            error = kind.__new__(kind)
            Exception.__init__(error, message)  # it was put into words over there
            return error
        kinds += kind.__subclasses__()
    return None
