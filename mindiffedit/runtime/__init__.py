"""What is global to a process or knows a device: kernels, compiled graphs and their cache, the lock."""
