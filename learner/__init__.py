import os

# Threads of torch that wait spin by default. With as many threads as cores and anything else at work on the machine,
# each wait then lasts a time slice: training was eight times slower (measured). Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
