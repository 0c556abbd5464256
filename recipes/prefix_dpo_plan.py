"""The old name of ``prefix_dpo_memory``, kept for one release."""

import sys

from prefix_dpo_memory import recipe_main

if __name__ == "__main__":
    print("prefix_dpo_plan is now prefix_dpo_memory; the old name goes with the next release.", file=sys.stderr)
    recipe_main()
