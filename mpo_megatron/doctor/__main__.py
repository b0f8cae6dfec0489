"""`torchrun … -m mpo_megatron.doctor`: `mpo doctor` on several machines, which are compared."""

import sys

from mpo_megatron.doctor.doctor import doctor

if __name__ == "__main__":
    sys.exit(doctor(sys.argv[1:]))
