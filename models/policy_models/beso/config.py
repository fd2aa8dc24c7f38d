"""The shape of one BESO network, and what its agent does besides sampling."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BesoConfig:
    """A BESO network. Sequence: [sigma, goal_1..G, s_1, a_1, ..., s_T, a_T, a_{T+1}, ..., a_{T+H-1}].

    Upstream has H = 1 (one action a control step, over a window of T observations). With H > 1 it is this project's
    chunked configuration of the same network: one observation, then H action tokens.

    Attributes:
        state_width: S; goals are states, so this is their width too.
        action_width: A.
        width: Embedding width d.
        layers: Transformer blocks.
        heads: Attention heads.
        goal_length: Goal frames G; 0 for a policy that takes no goal.
        window: Observations T.
        horizon: Future actions H.
        hidden_output: Width of the hidden layer of the output head; 0 for a linear head.
        sigma_data: Standard deviation of the normalised actions that the preconditioning assumes.
        zeroed_goal_dims: Goal dimensions set to 0 after scaling: what a goal does not prescribe.
    """

    __pydantic_config__ = {"extra": "forbid"}

    state_width: int
    action_width: int
    width: int
    layers: int
    heads: int
    goal_length: int = 1
    window: int = 1
    horizon: int = 1
    hidden_output: int = 0
    sigma_data: float = 0.5
    zeroed_goal_dims: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide an embedding of width {self.width}")
        if self.horizon > 1 and self.window > 1:
            # A window holds one observation and one action per control step. A robot that plays chunks sends fewer
            # observations than it plays actions, so there is no such window to fill.
            raise ValueError(f"a chunk (horizon {self.horizon}) answers one observation, got a window of {self.window}")

    @property
    def action_tokens(self) -> int:
        """Action tokens in a full sequence: T - 1 past ones, then H."""
        return self.window - 1 + self.horizon
