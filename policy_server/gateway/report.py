"""What a client is told about an error."""

import logging
import secrets

from policy_server.errors import PolicyServerError

logger = logging.getLogger(__name__)

_LONGEST = 1000


def describe(error: Exception) -> tuple[str, str]:
    """Return the error's code and the text for the client.

    Errors of our tree speak for themselves. Any other is our own mistake: it is logged with its traceback under an id,
    and the client is told that id alone.
    """
    if isinstance(error, PolicyServerError):
        text = f"{error.code}: {error}"
        # It may quote what the client sent, and that may be megabytes.
        return error.code, text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    request_id = secrets.token_hex(6)
    logger.error("request %s failed", request_id, exc_info=error)
    return "internal", f"internal: the server failed to answer; its log has the reason under id {request_id}"
