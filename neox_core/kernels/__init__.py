"""Which function runs on a device: attention kernels by name, and stand-ins for kernels while a simulation runs."""
