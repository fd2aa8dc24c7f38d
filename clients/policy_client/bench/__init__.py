"""`policy-bench`: load tests of policy servers. Needs the extra `load-test`; nothing else in the client imports it."""
