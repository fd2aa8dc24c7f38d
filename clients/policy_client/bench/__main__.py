"""`python -m policy_client.bench` is `policy-bench`."""

import sys

from policy_client.bench.cli import main

if __name__ == "__main__":  # not in the processes that play robots, which import this file too
    sys.exit(main())
