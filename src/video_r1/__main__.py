"""`python -m video_r1` is the same as `video-r1`."""

import sys

from video_r1.cli import main

sys.exit(main())
