"""The config doctor: what is wrong with a config, its weights and its data, before it costs a day.

check_config.py --config-file configs/COCO-Detection/faster_rcnn_SGE_R_50_FPN_2x.yaml --num-gpus 8
check_config.py --config-file F --dataset my_train train.json images/ SOLVER.IMS_PER_BATCH 4
check_config.py --config-file lazy/COCO-Detection/faster_rcnn_SGE_R_50_FPN_1x.py train.max_iter=1000

Takes train_net.py's arguments, for a lazy config (.py) lazy_train_net.py's.
Exit code 2 where there is an error, 0 otherwise.
"""

import sys

import quiet  # noqa: F401

from sge_det.engine.doctor import diagnose
from sge_det.engine.lazy_doctor import diagnose_lazily
from sge_det.engine.training import argument_parser
from sge_det.errors import UserError, user_errors


@user_errors
def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(epilog=__doc__)
    parser.add_argument("--images", action="store_true", help="open every image of the data sets, not 50 of each")
    args = parser.parse_args(argv)
    if not args.config_file:
        raise UserError("give a config with --config-file, for instance configs/sample/faster_rcnn_SGE_R_50_FPN.yaml")
    processes = max(args.num_gpus, 1) * args.num_machines
    asked = {"processes": processes, "eval_only": args.eval_only, "every_image": args.images}
    if args.config_file.endswith(".py"):
        findings = diagnose_lazily(args.config_file, args.opts, args.dataset, **asked)
    else:
        findings = diagnose(args.config_file, args.opts, args.dataset, resume=args.resume, **asked)
    for finding in findings:
        print(f"{finding.severity}: {finding}")
    errors = sum(finding.severity == "error" for finding in findings)
    print(f"{args.config_file}: {errors} errors, {len(findings) - errors} warnings")
    if errors:
        sys.exit(2)


if __name__ == "__main__":
    main()
