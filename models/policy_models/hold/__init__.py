"""Hold: no network at all. Every action of a chunk repeats the first A numbers of the state.

For wiring up a robot before its policy exists, and for measuring what everything but the policy costs.
"""
