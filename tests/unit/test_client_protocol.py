"""What a client says and understands, without a socket."""

from __future__ import annotations

import numpy as np
import pytest

from policy_client import AsyncPolicyClient, PolicyClient, ProtocolError, ServerError, pack, unpack
from policy_client.protocol import PolicyProtocol

TRACEBACK = "Traceback (most recent call last):\n  File \"policy.py\", line 1\nKeyError: 'endpoint'\n"


def greeted(metadata=None, step_s=None):
    protocol = PolicyProtocol(step_s)
    protocol.greet(pack({} if metadata is None else metadata))
    return protocol


def test_an_observation_is_sent_as_it_is_and_options_only_when_given():
    observation = {"observation/state": np.zeros(4), "images": {"front": np.zeros((2, 2, 3), np.uint8)}}
    protocol = PolicyProtocol()
    np.testing.assert_equal(unpack(protocol.infer_request(observation, {})), observation)
    optioned = unpack(protocol.infer_request(observation, {"steps": 4, "sampler": None}))
    np.testing.assert_equal(optioned, {**observation, "options": {"steps": 4}})


def test_numpy_numbers_among_the_options_are_sent_as_plain_ones():
    request = PolicyProtocol().infer_request({}, {"seed": np.int64(7), "guidance": np.float32(1.5)})
    assert request == pack({"options": {"seed": 7, "guidance": 1.5}})


def test_a_request_says_how_its_chunk_goes_on_from_the_one_before_and_when_it_is_played():
    options = {"continuity": {"mode": "rtc", "overlap": 2}, "captured_ms": 0.0, "delay_ms": np.float32(200)}
    request = PolicyProtocol().infer_request({}, {**options, "smoothing": {"sigma": 0.1}})
    assert unpack(request) == {"options": {**options, "delay_ms": 200.0, "smoothing": {"sigma": 0.1}}}


def test_requests_that_make_no_sense_are_refused():
    protocol = PolicyProtocol()
    with pytest.raises(TypeError, match=r"unknown options \['step'\], expected \['budget_ms', 'captured_ms'"):
        protocol.infer_request({}, {"step": 4})
    with pytest.raises(ValueError, match="a key 'options', which is reserved"):
        protocol.infer_request({"options": {}}, {"steps": 4})
    with pytest.raises(ValueError, match="cannot send dtype complex128"):
        protocol.infer_request({"state": np.zeros(2, complex)}, {})


@pytest.mark.parametrize(
    ("reply_s", "metadata_s", "given_s", "wanted_s"),
    [(None, 0.05, None, 0.05), (0.1, 0.05, None, 0.1), (0.1, 0.05, 0.2, 0.2), (np.float32(0.5), None, None, 0.5)],
)
def test_step_s_is_the_one_given_or_the_replys_or_the_metadatas(reply_s, metadata_s, given_s, wanted_s):
    protocol = greeted({"step_s": metadata_s} if metadata_s else {}, given_s)
    reply = {"actions": np.zeros((1, 1))} | ({"step_s": reply_s} if reply_s else {})
    assert protocol.infer_reply(pack(reply), 1.0).step_s == wanted_s


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        (b"\xc1", "the reply cannot be read: got bytes that are not"),
        (pack([1]), "the reply is a list, expected a map"),
        (pack({}), "'actions' is None, expected a numeric array"),
        (pack({"actions": [[1.0]]}), r"'actions' is \[\[1.0\]\], expected a numeric array"),
        (pack({"actions": np.array([["a"]])}), "'actions' is an array of <U1"),
        (pack({"actions": np.zeros(8)}), r"'actions' has shape \(8,\), expected \(H, A\)"),
        (pack({"actions": np.zeros((0, 8))}), r"'actions' has shape \(0, 8\)"),
        (pack({"actions": np.array([[np.nan]])}), "not finite"),
        (pack({"actions": np.array([[1e300]])}), "not finite"),
        (pack({"actions": np.zeros((1, 1)), "step_s": "slow"}), "the server's step_s is 'slow'"),
        (pack({"actions": np.zeros((1, 1)), "step_s": True}), "the server's step_s is True"),
        (pack({"actions": np.zeros((1, 1)), "step_s": -0.1}), "the server's step_s is -0.1"),
        (pack({"actions": np.zeros((1, 1))}), "does not say its step_s, give step_s to the client"),
    ],
)
def test_a_reply_that_is_no_chunk_is_refused(reply, complaint):
    with pytest.raises(ProtocolError, match=complaint):
        greeted().infer_reply(reply, 1.0)


def test_actions_of_any_number_type_become_read_only_float32():
    chunk = greeted(step_s=0.1).infer_reply(pack({"actions": np.array([[1, 2]], ">i2")}), 1.0)
    assert chunk.actions.dtype == np.float32
    assert chunk.actions.tolist() == [[1, 2]]
    assert not chunk.actions.flags.writeable


def test_a_reset_speaks_roboarenas_dialect():
    protocol = greeted()
    assert unpack(protocol.reset_request()) == {"endpoint": "reset"}
    protocol.reset_reply("reset successful")


def test_a_server_that_knows_no_reset_is_reported():
    with pytest.raises(ServerError, match="KeyError: 'endpoint'"):
        greeted().reset_reply(TRACEBACK)
    with pytest.raises(ProtocolError, match="the answer to a reset is 1 bytes, expected the text"):
        greeted().reset_reply(pack({}))


def test_an_error_of_this_projects_server_has_a_code_and_a_traceback_has_none():
    refusal = ServerError("shape_mismatch: 'state' has shape (3,), expected (4,)")
    assert refusal.code == "shape_mismatch"
    assert refusal.message == "'state' has shape (3,), expected (4,)"
    traceback = ServerError(TRACEBACK)
    assert traceback.code is None
    assert traceback.message == TRACEBACK


@pytest.mark.parametrize("client", [PolicyClient, AsyncPolicyClient])
def test_settings_that_cannot_be_right_are_refused_at_once(client):
    with pytest.raises(ValueError, match="url is 'localhost:8000', expected one that starts with ws://"):
        client("localhost:8000")
    with pytest.raises(ValueError, match="step_s is 0, expected a positive number"):
        client("ws://localhost:8000", step_s=0)


def test_the_key_is_not_shown():
    assert "secret" not in repr(PolicyClient("ws://localhost", api_key="secret"))
