"""The S3 server of the demo and the tests: OpenStack Swift with its S3 API, on loopback."""
