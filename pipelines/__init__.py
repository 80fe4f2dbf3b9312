"""The same algorithm on Ray: functions that build, functions that run, one module a stage."""
