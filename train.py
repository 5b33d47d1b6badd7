"""`python train.py compression=binary`: the command line of psc_lightning from a checkout (installed: `psc-train`)."""

from psc_lightning.app.main import main

if __name__ == "__main__":
    main()
