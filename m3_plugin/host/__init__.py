"""What is the same around any host: presence in logs and metrics, a server as a child process."""
