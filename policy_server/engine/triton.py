"""Policies that run on Triton servers: one gRPC round trip a chunk, to the server with the least to do."""

import asyncio
import contextlib
import logging
import math
import re
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from grpc import RpcError, StatusCode
from tritonclient.grpc.service_pb2 import InferParameter, ModelInferRequest, ModelReadyRequest, ServerLiveRequest
from tritonclient.utils import deserialize_bytes_tensor, np_to_triton_dtype, serialize_byte_tensor, triton_to_np_dtype

from policy_models.program import Outcome, Tensors
from policy_models.spec import Observation, SamplingOptions
from policy_server import kserve
from policy_server.engine.triton_server import TritonServer, reason_of
from policy_server.errors import (
    BundleInvalid,
    DeadlineExceeded,
    EngineFailed,
    EngineUnavailable,
    EngineUnreachable,
    PolicyServerError,
    StartupError,
    revive,
)

if TYPE_CHECKING:
    from policy_server.bundle import Bundle
    from policy_server.runtime.deadline import Deadline

logger = logging.getLogger(__name__)

_LOOK_S = 1.0
_START_S = 60.0
# How Triton says that the process of one model is gone; it goes on calling that model ready.
_PROCESS_DIED = "is not healthy"
# What says that a server cannot answer, and not that a request is wrong.
_DOWN = (StatusCode.UNAVAILABLE, StatusCode.NOT_FOUND, StatusCode.CANCELLED)


class TritonServers:
    """Triton servers that all have the same model repository, and the policies that run on them.

    Attributes:
        mending: Which servers are loading which policies anew.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self._servers = tuple(TritonServer(url) for url in urls)
        self._policies: list[TritonInference] = []
        self._watch: asyncio.Task[None] | None = None
        self.mending: dict[tuple[TritonServer, str], asyncio.Task[None]] = {}

    def wait(self, timeout_s: float) -> None:
        """Wait until every server lives; one that does not is left out until it does.

        Raises:
            EngineUnavailable: None lives.
        """
        until_s = time.monotonic() + timeout_s
        reasons = []
        for server in self._servers:
            try:
                server.control.wait(until_s - time.monotonic())
            except EngineUnavailable as error:
                server.leave_out(str(error))
                reasons.append(str(error))
        if not self.up():
            raise EngineUnavailable("; ".join(reasons) or "no Triton server is named; --triton-url does that")

    def up(self) -> tuple[TritonServer, ...]:
        """Return the servers that requests are sent to."""
        return tuple(server for server in self._servers if server.is_up)

    def load(self, bundle: "Bundle", probe: Observation) -> "TritonInference":
        """Have every server that is up load a bundle from its repository, beside its older versions.

        Raises:
            BundleInvalid: Its version is no number, or belongs to another bundle.
            EngineUnavailable: A server cannot load it, or has another bundle of this name and version; or none is up.
        """
        if not self.up():
            raise EngineUnavailable("no Triton server is up")
        policy = TritonInference(self, bundle, probe)
        if any(p.name == policy.name and p.version == policy.version for p in self._policies):
            raise BundleInvalid(
                f"version {policy.version} of {policy.name!r} is served already; give the new bundle a higher one"
            )
        try:
            for server in self.up():
                policy.load(server, [*self._versions(policy.name), policy.version])
        except BaseException:
            self._unload_others(policy.name)
            raise
        self._policies.append(policy)
        return policy

    def retire(self, policy: "TritonInference") -> None:
        """Unload one version from every server."""
        self._policies.remove(policy)
        self._unload_others(policy.name)

    def pick(self, tried: set[TritonServer]) -> TritonServer | None:
        """Return the server with the least to do; starts watching them all with the first call."""
        self.watch()
        rivals = [server for server in self.up() if server not in tried]
        return min(rivals, key=lambda server: (server.outstanding, server.asked)) if rivals else None

    def watch(self) -> bool:
        """Return whether any server is up, and see to it that they are looked after from now on."""
        if self._watch is None:
            self._watch = asyncio.create_task(self._look_after_all())
        return bool(self.up())

    def mend(self, server: TritonServer, policy: "TritonInference") -> None:
        """Have a server load a policy anew, whose process died there; other policies go on meanwhile."""
        if (server, policy.name) not in self.mending:
            self.mending[server, policy.name] = asyncio.create_task(self._mend(server, policy))

    async def _mend(self, server: TritonServer, policy: "TritonInference") -> None:
        logger.warning("Triton at %s lost the process of %s, and loads it anew", server.url, policy.name)
        try:
            await asyncio.to_thread(server.control.unload, policy.name)
            await asyncio.to_thread(policy.load, server, self._versions(policy.name))
        except StartupError as error:
            logger.warning("%s", error)
        finally:
            del self.mending[server, policy.name]

    async def _look_after_all(self) -> None:
        await asyncio.gather(*map(self._look_after, self._servers))

    async def _look_after(self, server: TritonServer) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            try:
                if server.is_up and not await self._serves_all(server):
                    server.leave_out("it has not loaded every policy: it was started anew")
                if not server.is_up and (await server.stub.ServerLive(ServerLiveRequest(), timeout=_LOOK_S)).live:
                    for policy in tuple(self._policies):
                        await asyncio.to_thread(policy.load, server, self._versions(policy.name))
                    logger.info("Triton at %s is back", server.url)
                    server.is_up = True
            except RpcError as error:
                server.leave_out(reason_of(error))
            except StartupError as error:
                server.leave_out(str(error))
            except Exception:  # who looks after the others must not end
                logger.exception("looking after Triton at %s failed", server.url)

    async def _serves_all(self, server: TritonServer) -> bool:
        for policy in tuple(self._policies):
            asked = ModelReadyRequest(name=policy.name, version=str(policy.version))
            ready = (await server.stub.ModelReady(asked, timeout=_LOOK_S)).ready
            # It may have been retired meanwhile, or be loaded anew.
            if not ready and policy in self._policies and (server, policy.name) not in self.mending:
                return False
        return True

    def _versions(self, name: str) -> list[int]:
        """Return the versions of a policy that some session may ask for."""
        return [policy.version for policy in self._policies if policy.name == name]

    def _unload_others(self, name: str) -> None:
        if versions := self._versions(name):
            for server in self.up():  # one that is down loads what is in use when it is back
                with contextlib.suppress(EngineUnavailable):
                    server.control.load(name, versions)


class TritonInference:
    """One version of a policy on Triton; an `Inference`.

    Attributes:
        name: The policy's.
        version: Of its bundle, and so of its models.
        tolerance: Drift from the golden case that its models accept, as a fraction of the action range.
        chunk_s: What a chunk takes, once that was measured.
        differentiable: See `Inference.differentiable`.
    """

    def __init__(self, servers: TritonServers, bundle: "Bundle", probe: Observation) -> None:
        if not (bundle.manifest.version.isdecimal() and int(bundle.manifest.version) > 0):
            raise BundleInvalid(
                f"{bundle.name!r} has version {bundle.manifest.version!r}, but Triton counts versions: 1, 2, 3, ..."
            )
        self.name = bundle.name
        self.version = int(bundle.manifest.version)
        self.tolerance = 0.0
        self.chunk_s = 0.0
        self.differentiable = False
        self._servers = servers
        self._digest = bundle.digest.encode()
        self._probe = probe
        self._beginning = bundle.new_program().begin()
        ports = kserve.output_ports(bundle.spec, self._beginning)
        self._outputs = tuple(port.name for port in ports if port.name != kserve.BUNDLE)

    @property
    def reachable(self) -> bool:
        """See `Inference.reachable`."""
        return self._servers.watch()

    @property
    def capacity_hz(self) -> float:
        """See `Inference.capacity_hz`: of one robot at a time, on each server that is up."""
        return len(self._servers.up()) / self.chunk_s if self.chunk_s else math.inf

    @property
    def thinks(self) -> bool:
        """See `Inference.thinks`: a program on Triton reasons while it acts, and a request has one answer."""
        return False

    def begin(self) -> Tensors:
        """See `Inference.begin`."""
        return self._beginning

    async def infer(
        self,
        observation: Observation,
        memory: Tensors,
        options: SamplingOptions,
        deadline: "Deadline",
        tenant: str = "",
    ) -> Outcome:
        """See `Inference.infer`. A server that fails is left out or mended; others are asked while there is time."""
        request = self._request(observation, memory, options, self._outputs)
        tried: set[TritonServer] = set()
        reason = "every server is down"
        while (server := self._servers.pick(tried)) is not None:
            deadline.check()
            tried.add(server)
            server.asked += 1
            server.outstanding += 1
            try:
                reply = await server.stub.ModelInfer(request, timeout=deadline.remaining_s())
            except RpcError as error:
                reason = reason_of(error)
                if _PROCESS_DIED in reason or (server, self.name) in self._servers.mending:
                    self._servers.mend(server, self)
                elif error.code() in _DOWN:
                    server.leave_out(reason)
                else:
                    raise _typed(error, self.name, deadline) from error
            else:
                return kserve.unpack_reply(_tensors(reply), memory)
            finally:
                server.outstanding -= 1
        raise EngineUnreachable(self.name, reason)

    def ask(self, server: TritonServer, observation: Observation, options: SamplingOptions) -> Outcome:
        """Answer one observation of a new episode, blocking; raises EngineUnavailable, also for another bundle."""
        request = self._request(observation, self._beginning, options, (*self._outputs, kserve.BUNDLE))
        try:
            tensors = _tensors(server.blocking.ModelInfer(request, timeout=_START_S))
        except RpcError as error:
            raise EngineUnavailable(
                f"Triton at {server.url} does not answer for {self.name!r}: {reason_of(error)}"
            ) from error
        got = tensors[kserve.BUNDLE][0, 0]
        if got != self._digest:
            raise EngineUnavailable(
                f"Triton at {server.url} has another bundle as version {self.version} of {self.name!r}: the digest of "
                f"its policy.yaml is {got.decode()[:16]}..., wanted is {self._digest.decode()[:16]}..."
            )
        return kserve.unpack_reply(tensors, self._beginning)

    def load(self, server: TritonServer, versions: Sequence[int]) -> None:
        """Have one server load this version, of `versions` in use, and ask it; raises EngineUnavailable."""
        parameters = server.control.load(self.name, versions)
        if "tolerance" not in parameters:
            raise EngineUnavailable(
                f"Triton at {server.url} has a model {self.name!r} that `policy-server export triton` did not write"
            )
        self.tolerance = float(parameters["tolerance"])
        self.differentiable = parameters.get("gradients") == "true"
        self.ask(server, self._probe, SamplingOptions(seed=0))

    def retire(self) -> None:
        """See `Inference.retire`: the servers unload this version."""
        self._servers.retire(self)

    def close(self) -> None:
        """See `Inference.close`: the models stay where they are, for whoever asks next."""

    def _request(
        self, observation: Observation, memory: Tensors, options: SamplingOptions, outputs: Sequence[str]
    ) -> ModelInferRequest:
        request = ModelInferRequest(model_name=self.name, model_version=str(self.version))
        for name, value in kserve.pack_options(options).items():
            request.parameters[name].MergeFrom(
                InferParameter(string_param=value) if isinstance(value, str) else InferParameter(int64_param=value)
            )
        for name, array in kserve.pack_request(observation, memory, options.continuation).items():
            request.inputs.add(name=name, datatype=np_to_triton_dtype(array.dtype), shape=array.shape)
            request.raw_input_contents.append(
                serialize_byte_tensor(array).item() if array.dtype == object else array.tobytes()
            )
        for name in outputs:
            request.outputs.add(name=name)
        return request


def _tensors(reply: Any) -> dict[str, np.ndarray]:
    """Return the outputs of a reply, (1, ...) each, as views of its bytes."""
    return {
        output.name: (
            deserialize_bytes_tensor(content)
            if output.datatype == "BYTES"
            else np.frombuffer(content, triton_to_np_dtype(output.datatype))
        ).reshape(output.shape)
        for output, content in zip(reply.outputs, reply.raw_output_contents, strict=True)
    }


def _typed(error: RpcError, policy: str, deadline: "Deadline") -> PolicyServerError:
    """Return what a failed request means: the policy's own refusal, a missed deadline, or a failure over there."""
    if error.code() == StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(1e3 * deadline.late_s())
    refusal = re.fullmatch(r"([a-z_]+): (.+)", error.details() or "", re.DOTALL)
    known = revive(*refusal.groups()) if refusal else None
    return known or EngineFailed(f"policy {policy!r} failed on its server: {reason_of(error)}")
