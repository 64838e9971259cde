# For the Raspberry Pi 3 and 4. Their firmware starts U-Boot, whose UEFI starts systemd-boot, so that
# from there on the board is a UEFI machine like any other.
{
  config,
  pkgs,
  ...
}:

let
  inherit (pkgs)
    raspberrypi-armstubs
    raspberrypifw
    ubootRaspberryPi3_64bit
    ubootRaspberryPi4_64bit
    ;

  uboot = pkgs.linkFarm "headgate-rpi-u-boot" {
    "u-boot-rpi3.bin" = "${ubootRaspberryPi3_64bit}/u-boot.bin";
    "u-boot-rpi4.bin" = "${ubootRaspberryPi4_64bit}/u-boot.bin";
  };

  # The firmware's part of the EFI system partition. It comes with the image and no update writes it.
  firmware = pkgs.runCommand "headgate-rpi-firmware" { __structuredAttrs = true; } ''
    sh ${./firmware.sh} "$out" \
      ${raspberrypifw}/share/raspberrypi/boot ${uboot} ${raspberrypi-armstubs}
  '';
in
{
  imports = [ ./base.nix ];

  assertions = [
    {
      assertion = pkgs.stdenv.hostPlatform.isAarch64;
      message = ''
        images/rpi.nix is for the 64-bit Raspberry Pi 3 and 4, and nixpkgs.hostPlatform is
        ${pkgs.stdenv.hostPlatform.system}: set it to "aarch64-linux", or use images/uefi.nix.
      '';
    }
  ];

  boot = {
    # The serial port on pins 8 and 10 is the first or the second of its kind, by whose device tree
    # the kernel got; the one that isn't there does no harm.
    kernelParams = [
      "console=ttyS1,115200n8"
      "console=ttyS0,115200n8"
      "console=tty0"
    ];
    initrd = {
      availableKernelModules = [
        "bcm2835"
        "bcm2835_dma"
        "mmc_block"
        "pcie_brcmstb"
        "reset-raspberrypi"
        "sd_mod"
        "sdhci_iproc"
        "uas"
        "usb_storage"
        "xhci_pci"
      ];
      # What one kernel has as a module, another has built in.
      allowMissingModules = true;
    };
  };

  # Wireless LAN does not come up without it.
  hardware.firmware = [ pkgs.raspberrypiWirelessFirmware ];

  image = {
    # Unpacked again below.
    repart.compression.level = 1;
    repart.partitions."10-esp".contents."/".source =
      pkgs.runCommand "headgate-esp-rpi"
        {
          __structuredAttrs = true;
        }
        ''
          mkdir "$out"
          cp -r --no-preserve=mode ${config.system.build.headgateEsp}/. ${firmware}/. "$out"
        '';
    sbom.paths = [
      raspberrypi-armstubs
      raspberrypifw
      ubootRaspberryPi3_64bit
      ubootRaspberryPi4_64bit
    ];
  };

  system.build.sdImage =
    pkgs.buildPackages.runCommand "${config.image.baseName}-rpi"
      {
        __structuredAttrs = true;
        nativeBuildInputs = [
          pkgs.buildPackages.gptfdisk
          pkgs.buildPackages.zstd
        ];
      }
      ''
        mkdir "$out"
        zstd --decompress ${config.system.build.image}/${config.image.fileName} -o disk.img
        sh ${./hybrid-mbr.sh} disk.img
        zstd -T"$NIX_BUILD_CORES" -9 disk.img \
          -o "$out/${config.image.baseName}-rpi.img.zst"
      '';
}
