import os

if "PYTEST_XDIST_WORKER" in os.environ:  # several workers share the cores; set before torch is imported
    os.environ["OMP_NUM_THREADS"] = "1"
