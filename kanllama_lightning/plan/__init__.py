"""What a run will take, said before anything is started: `python train.py plan ...`."""
