"""What serving costs, measured with perf_analyzer against a real server."""
