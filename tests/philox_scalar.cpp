// csrc/philox.h on scalars, the text that CUDA compiles, as a filter: test_noise.py feeds it.
//   words     reads (key low, key high, 4 counter words), writes 4 words
//   normals   reads words (a, b), writes the normals of an even and an odd column
#include <stdio.h>
#include <string.h>

#include "philox.h"

int main(int, char** argv) {
  if (!strcmp(argv[1], "words")) {
    uint32_t in[6];
    while (fread(in, sizeof in, 1, stdin) == 1) {
      const auto out = philox4x32_10(PhiloxWords<uint32_t>{in[2], in[3], in[4], in[5]}, PhiloxKey{in[0], in[1]});
      fwrite(&out, sizeof out, 1, stdout);
    }
  } else {
    uint32_t in[2];
    while (fread(in, sizeof in, 1, stdin) == 1) {
      float out[2];
      box_muller(in[0], in[1], out[0], out[1]);
      fwrite(out, sizeof out, 1, stdout);
    }
  }
}
