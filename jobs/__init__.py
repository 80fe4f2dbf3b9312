"""Entry points: parse, call one pipeline function, print one JSON line, set the exit code."""
