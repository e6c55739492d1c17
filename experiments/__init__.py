"""The talk's experiments, one command each, run from the repository's root::

    python -m experiments.swa --data digits                        stochastic weight averaging against SGD

``python -m experiments`` lists them. ``--data digits`` is the default and takes a minute or two on one CPU thread;
``--data cifar10 --root DIR`` and the like take the published settings and a GPU. Every command knows ``--help`` and
``--quick``, prints the published numbers beside its own, and writes its pictures and a record (JSON) to
``experiments_output/``, or ``--out``. One that was killed goes on where it was when it is called again. Several GPUs::

    torchrun --nproc-per-node 4 -m experiments.swa --data cifar100 --root DIR --model preresnet164
"""
