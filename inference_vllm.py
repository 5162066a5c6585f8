"""`octavo batch persona` under the name and with the flags it had before: --checkpoint_dir, --num_samples, …

    python inference_vllm.py --checkpoint_dir smollm2 --dataset Chameleons --ablation_config context_only \
        --num_samples 5 --output_dir outputs/chameleons

Flags may be written with _ or with -; --help shows all of them. Guide: docs/batch.md.
"""

from __future__ import annotations

import sys

from octavo.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["batch", "persona", *sys.argv[1:]]))
