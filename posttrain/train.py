"""`accelerate launch … -m posttrain.train RECIPE`: the same job as `posttrain run RECIPE`, in processes that a launcher
has started."""

from posttrain.cli.run import main_in_process

if __name__ == "__main__":
    main_in_process()
