"""The long tests, run by `make torture`: fuzzed files, killed processes, many clients at once."""
